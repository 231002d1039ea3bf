//! What the arguments ask for.

use llmpress_pipeline::{CalibrationText, Recipe, Request};

use crate::args::RecipeArgs;
use crate::report::Failure;
use crate::text::read_text;

/// The recipe, and what its passes go by.
pub(crate) fn request(args: &RecipeArgs, calibration: CalibrationText) -> Result<Request, Failure> {
    let mut recipe = match (&args.recipe, &args.to) {
        (Some(path), _) => Recipe::from_toml(path, &read_text(path)?)?,
        (None, Some(to)) => to.clone(),
        (None, None) => {
            return Err(Failure::Usage(
                "say what to make: --to dfloat11, fixed12, planes, archive, sparse24, a pruning or a quantiser, or --recipe FILE".to_owned(),
            ));
        }
    };
    recipe.rules.extend(args.rules.iter().cloned());
    if let Some(path) = &args.pattern_file {
        let text = read_text(path)?;
        let value: serde_json::Value = llmpress_formats::python_json(text.as_bytes())
            .map_err(|e| llmpress_formats::Error::corrupt(path, None, format!("is not valid JSON: {e}")))?;
        // A whole `dfloat11_config` or `config.json` will do as well.
        let inner = value.get("dfloat11_config").unwrap_or(&value);
        recipe.pattern_dict = Some(inner.get("pattern_dict").unwrap_or(inner).clone());
    }
    recipe.tied_embedding |= args.tied_embedding;
    recipe.entropy_code |= args.entropy_code;
    if let Some(mean) = args.target_bits {
        let quantisers = recipe.passes.iter_mut().filter_map(llmpress_pipeline::Pass::quantiser_mut);
        let quantiser = quantisers.last().ok_or_else(|| {
            Failure::Usage("--target-bits is for a quantiser: --to gptq:w4,g128 or the like".to_owned())
        })?;
        quantiser.assign(mean)?;
    }
    if let Some(ratio) = args.target_ratio {
        let mut sparsifiers = recipe.passes.iter_mut().filter_map(llmpress_pipeline::Pass::sparsifier_mut);
        let sparsifier = sparsifiers.next().ok_or_else(|| {
            Failure::Usage(
                "--target-ratio is for what makes matrices 2:4: --to sparse24:sparsegpt or the like"
                    .to_owned(),
            )
        })?;
        sparsifier.assign(ratio)?;
    }
    if args.epochs.is_some() || args.seed.is_some() {
        let quantisers = recipe.passes.iter_mut().filter_map(llmpress_pipeline::Pass::quantiser_mut);
        let quantiser = quantisers.last().ok_or_else(|| {
            Failure::Usage(
                "--epochs and --seed are for a quantiser that learns: --to abq:w2a8,learn".to_owned(),
            )
        })?;
        quantiser.learns(args.epochs, args.seed)?;
    }
    if args.portable {
        if !recipe.passes.iter().any(llmpress_pipeline::Pass::prunes) {
            return Err(Failure::Usage(
                "--portable is for prunings: --to drop:... or finercut:...".to_owned(),
            ));
        }
        recipe.passes.iter_mut().for_each(llmpress_pipeline::Pass::make_portable);
    }
    Ok(Request { recipe, calibration, rankings: args.ranking.clone(), base: args.base.clone() })
}
