//! What `llmpress bench gpu` runs as processes of their own and no other verb does.

use llmpress_formats::Error;
use llmpress_kernels::gpu::Gpu;
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_kernels::gpu::proof::{Proof, prove};
use llmpress_validation::RandomModel;
use serde_json::json;

use crate::Outcome;
use crate::args::{BenchProofsArgs, Device, RandomModelArgs, Shapes};
use crate::models::device_failure;
use crate::report::{Failure, Output, print};

/// Proves every kernel against its reference: a line a proof, at once, so that a run that is cut short leaves what it had.
pub(crate) fn proofs(args: &BenchProofsArgs, output: Output) -> Outcome {
    let Device::Cuda(ordinal) = args.device else {
        return Err(Failure::Usage("--device: the kernels of a GPU run on cuda or cuda:N".to_owned()));
    };
    let gpu = Gpu::new(Cuda::open(ordinal).map_err(device_failure)?);
    let proofs = prove(&gpu, &mut |proof: &Proof| match serde_json::to_string(proof) {
        Ok(line) if output.json => print(&format!("{line}\n")),
        _ => print(&format!(
            "{} {}: {}\n",
            proof.kernel,
            proof.shape,
            match &proof.fault {
                Some(fault) => format!("WRONG: {fault}"),
                None if proof.exact => "equal bit for bit".to_owned(),
                None => format!("near: {:.3} of what rounding allows", proof.worst),
            }
        )),
    })
    .map_err(device_failure)?;
    match proofs.iter().filter(|proof| !proof.holds()).count() {
        0 => Ok(()),
        wrong => Err(Failure::Findings(format!("{wrong} of {} proofs fail", proofs.len()))),
    }
}

/// Makes a checkpoint with random weights.
pub(crate) fn random_model(args: &RandomModelArgs, output: Output) -> Outcome {
    let model = match args.like {
        Shapes::Small => RandomModel::Small,
        Shapes::Llama3_8b => RandomModel::Llama3_8b { layers: args.layers },
    };
    if args.dir.exists() {
        return Err(Failure::from(Error::Invalid(format!("{} exists already", args.dir.display()))));
    }
    model.write(&args.dir)?;
    let made = json!({"layers": model.layers(), "bytes": model.bytes()});
    output.result(&made, || {
        format!(
            "{}: {} layers, {}\n",
            args.dir.display(),
            model.layers(),
            crate::report::bytes(model.bytes())
        )
    });
    Ok(())
}
