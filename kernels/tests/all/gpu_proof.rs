//! What a GPU has to pass, the emulator passes to the bit; and a device that computes wrongly does not.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::proof::prove;
use llmpress_kernels::gpu::{Backend, Gpu, Graph, Launch, Result};

#[test]
fn every_kernel_is_proven_and_every_result_is_told() {
    let mut told = 0;
    let proofs = prove(&Gpu::new(Emulator::new()), &mut |_| told += 1).unwrap();
    let failed: Vec<_> = proofs.iter().filter(|proof| !proof.holds()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(told, proofs.len());
    assert!(proofs.iter().all(|proof| proof.exact), "the emulator adds in the stated order");
    for kernel in [
        "decode_dfloat11",
        "decode_fixed12",
        "read_all",
        "block_sums",
        "rms_norm",
        "add_rms_norm",
        "rms_norm_rows",
        "round_rows",
        "layer_norm",
        "layer_norm without a bias",
        "silu_gate",
        "gelu_tanh_gate",
        "embed_bf16",
        "embed_f16",
        "embed_f32",
        "embed_fixed12",
        "add_positions",
        "argmax",
        "advance",
        "draw",
        "soft_cap",
        "route_tokens",
        "group_tokens",
        "experts bf16 Stream8",
        "experts fixed12 Stream32",
        "experts f16 Panel64",
        "experts f32 Stream8",
        "combine_experts",
        "rope",
        "attend Rows",
        "attend Tiles",
        "keep_codes",
        "attend codes Rows",
        "attend codes Tiles",
        "sparse24 stream of 8 tokens x 16 rows, 4 deep",
        "sparse24 fixed12 panel of 16 tokens x 128 rows, 4 deep",
        "abq bits, 1 x 16 planes x 16 rows",
        "abq bytes, 8 tokens x 16 rows",
    ] {
        assert!(proofs.iter().any(|proof| proof.kernel == kernel), "{kernel}");
    }
}

/// A device that gets a bit of everything it computes wrong.
#[derive(Debug)]
struct Wrong(Emulator);

impl Backend for Wrong {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.0.allocate(bytes)
    }
    fn free(&self, address: u64) {
        self.0.free(address);
    }
    fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.0.write(address, data)
    }
    fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.0.read(address, data)?;
        if let Some(byte) = data.first_mut() {
            *byte ^= 1;
        }
        Ok(())
    }
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.0.copy(from, to, bytes)
    }
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        if launch.kernel == "rope" {
            return Err(llmpress_kernels::gpu::Error::Unsupported("no such kernel".to_owned()));
        }
        self.0.launch(launch)
    }
    fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }
    fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors()
    }
    fn shared_limit(&self) -> u32 {
        self.0.shared_limit()
    }
    fn adds_in_order(&self) -> bool {
        true
    }
    fn memory(&self) -> Result<(usize, usize)> {
        self.0.memory()
    }
    fn begin_capture(&self) -> Result<()> {
        self.0.begin_capture()
    }
    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.0.end_capture()
    }
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.0.timed(work)
    }
}

#[test]
fn a_device_that_computes_wrongly_or_lacks_a_kernel_is_found_out() {
    let proofs = prove(&Gpu::new(Wrong(Emulator::new())), &mut |_| ()).unwrap();
    let of = |kernel: &str| proofs.iter().filter(|proof| proof.kernel == kernel).collect::<Vec<_>>();
    for kernel in ["decode_dfloat11", "decode_fixed12", "rms_norm", "embed_bf16", "argmax", "draw"] {
        let proofs = of(kernel);
        assert!(!proofs.is_empty() && proofs.iter().any(|proof| !proof.holds()), "{kernel}");
    }
    let attention = of("attention");
    assert!(attention.iter().all(|p| p.fault.as_deref() == Some("no such kernel")), "{attention:?}");
}
