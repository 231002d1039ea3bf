//! How fast this library decodes a checkpoint on one thread: the figure that bindings are measured against.
//!
//! ```text
//! cargo run --release -p llmpress-formats --example read_speed -- DIR 5
//! ```
//!
//! Reads every tensor into new memory, so many times, and prints a line of JSON a round: `{"bytes": ..., "seconds": ...}`.

#![allow(clippy::print_stdout)] // It is what it is for.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use llmpress_formats::Checkpoint;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or("give the checkpoint's directory")?);
    let rounds: usize = match arguments.next() {
        Some(rounds) => rounds.to_string_lossy().parse()?,
        None => 1,
    };
    let checkpoint = Checkpoint::open_dequantised(&dir)?;
    for _ in 0..rounds {
        let (start, mut bytes) = (Instant::now(), 0);
        for name in checkpoint.tensors().keys() {
            bytes += std::hint::black_box(checkpoint.read_tensor(name)?).len();
        }
        println!("{{\"bytes\": {bytes}, \"seconds\": {}}}", start.elapsed().as_secs_f64());
    }
    Ok(())
}
