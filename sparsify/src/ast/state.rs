//! A run between two steps, as bytes (`learn/src/state.rs` says what is around them).
//!
//! ```text
//! "AST1" ...   matrices: masks, W, m, v, S, m, v | norms: w, m, v
//! ```

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};
use llmpress_learn::{StateHead, read_state, read_values, write_state, write_values};

use super::trainer::Trainer;

const MAGIC: &[u8; 4] = b"AST1";

impl Trainer<'_> {
    /// Writes it. `path` is for errors.
    pub(super) fn write(&self, to: &mut dyn Write, path: &Path) -> Result<()> {
        let head = StateHead { magic: MAGIC, key: &self.key };
        write_state(head, self.step, (to, path), &mut |to| {
            for matrix in self.student.matrices() {
                to.write_all(&matrix.masks)?;
                let all = [&matrix.dense, &matrix.first, &matrix.second];
                let sums = [&matrix.sums, &matrix.sums_first, &matrix.sums_second];
                all.into_iter().chain(sums).try_for_each(|values| write_values(values, to))?;
            }
            for norm in self.student.vectors() {
                [&norm.values, &norm.first, &norm.second]
                    .into_iter()
                    .try_for_each(|values| write_values(values, to))?;
            }
            Ok(())
        })
    }

    /// Takes it up, unless it is of another run.
    ///
    /// # Errors
    /// A file that cannot be read, is too short, or is not what was written.
    pub(super) fn read(&mut self, from: &mut dyn Read, path: &Path) -> Result<()> {
        let key = self.key;
        let head = StateHead { magic: MAGIC, key: &key };
        let student = &mut self.student;
        let step = read_state(head, (from, path), &mut |from| {
            for matrix in student.matrices_mut() {
                from.read_exact(&mut matrix.masks)?;
                let all = [&mut matrix.dense, &mut matrix.first, &mut matrix.second];
                let sums = [&mut matrix.sums, &mut matrix.sums_first, &mut matrix.sums_second];
                all.into_iter().chain(sums).try_for_each(|values| read_values(values, from))?;
            }
            for norm in student.vectors_mut() {
                [&mut norm.values, &mut norm.first, &mut norm.second]
                    .into_iter()
                    .try_for_each(|values| read_values(values, from))?;
            }
            Ok(())
        })?;
        let Some(step) = step else { return Ok(()) };
        let is_wrong = |mask: &u8| mask.count_ones() != 2 || *mask > 15;
        if self.student.matrices().any(|matrix| matrix.masks.iter().any(is_wrong)) {
            let what = "is not what was written: delete it to train from the start";
            return Err(Error::corrupt(path, None, what.to_owned()));
        }
        self.step = step;
        self.see();
        Ok(())
    }
}
