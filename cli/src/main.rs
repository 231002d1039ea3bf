//! The llmpress command.

fn main() {}
