//! What a tokenizer's regular expressions may take of memory: each becomes several automata, and a few characters can
//! ask for large ones.
//!
//! ```text
//! \w{500}|\s+(?!\S)|...    pieces between | and what looks around; an automaton each
//! ```

use fancy_regex::{CompileError, Error, RegexBuilder};

/// Most expressions.
const MAX_EXPRESSIONS: usize = 16;
/// Longest expression, and all of them together, in bytes; published tokenizers have some 700.
const MAX_BYTES: usize = 4096;
const MAX_BYTES_TOGETHER: usize = 8192;
/// Most pieces of all expressions; published tokenizers have some 60.
const MAX_PIECES: usize = 192;
/// Most bytes of a piece's automaton. Backwards it has another, and each a cache of some MiB.
const MAX_PIECE_BYTES: usize = 2 << 20;
/// Longest texts that are searched for as they are, together.
const MAX_LITERAL_BYTES: usize = 64 << 10;

/// The patterns of a tokenizer's rules.
#[derive(Debug, Default)]
pub(super) struct Expressions {
    expressions: Vec<String>,
    literals: usize,
}

impl Expressions {
    /// Adds a pattern of a rule: an expression, or a text that is to be found as it is.
    pub(super) fn add(&mut self, kind: &str, pattern: &str) -> Result<(), String> {
        if kind == "String" {
            self.literals += pattern.len();
            if self.literals > MAX_LITERAL_BYTES {
                return Err(format!("searches for texts of more than {MAX_LITERAL_BYTES} bytes together"));
            }
            return Ok(());
        }
        if pattern.len() > MAX_BYTES {
            return Err(format!(
                "has a regular expression of {} bytes, the most is {MAX_BYTES}",
                pattern.len()
            ));
        }
        if self.expressions.len() == MAX_EXPRESSIONS {
            return Err(format!("has more than {MAX_EXPRESSIONS} regular expressions"));
        }
        self.expressions.push(pattern.to_owned());
        Ok(())
    }

    /// Refuses expressions that would take much memory. What is no expression at all is left to the tokenizer.
    pub(super) fn check(&self) -> Result<(), String> {
        let bytes: usize = self.expressions.iter().map(String::len).sum();
        if bytes > MAX_BYTES_TOGETHER {
            return Err(format!(
                "has regular expressions of {bytes} bytes, the most is {MAX_BYTES_TOGETHER}"
            ));
        }
        let pieces: usize = self.expressions.iter().map(|e| pieces(e)).sum();
        if pieces > MAX_PIECES {
            return Err(format!(
                "has regular expressions of {pieces} alternatives and groups, the most is {MAX_PIECES}"
            ));
        }
        for expression in &self.expressions {
            let tried = RegexBuilder::new(expression).delegate_size_limit(MAX_PIECE_BYTES).build();
            if let Err(Error::CompileError(error)) = tried
                && let CompileError::InnerError(error) = *error
                && error.size_limit().is_some()
            {
                return Err(format!("has a regular expression that takes too much memory: {expression:.60}"));
            }
        }
        Ok(())
    }
}

/// At least as many as there are automata of an expression: it is cut at alternatives, groups, what refers back, and
/// repetitions that give nothing back.
fn pieces(expression: &str) -> usize {
    let bytes = expression.as_bytes();
    let cuts = |i: usize| match (bytes[i], bytes.get(i + 1)) {
        (b'(' | b'|', _) => true,
        (b'\\', Some(next)) => next.is_ascii_digit() || b"kgKGABbzZ<>".contains(next),
        (b'+' | b'*' | b'?' | b'}', Some(b'+')) => true,
        _ => false,
    };
    1 + 2 * (0..bytes.len()).filter(|&i| cuts(i)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(expressions: &[&str]) -> Result<(), String> {
        let mut all = Expressions::default();
        for expression in expressions {
            all.add("Regex", expression)?;
        }
        all.check()
    }

    #[test]
    fn published_expressions_pass() {
        for expressions in [
            &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"][..],
            &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            &[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            &[
                r"\p{N}{1,3}",
                r"[一-龥぀-ゟ゠-ヿ]+",
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
            ],
            &[r"(?:^|\s)[^\S\n]*(?<=\d)(?=(?:\d{3})+(?!\d))", r" {2,}", r" ?[^(\s|[.,!?…。，、।۔،])]+"],
        ] {
            check(expressions).unwrap();
        }
    }

    #[test]
    fn what_would_take_much_memory_is_refused() {
        assert!(check(&[r"\w{1000}"]).unwrap_err().contains("too much memory"));
        assert!(check(&[r"(?=a)((\w{50}){50}){50}"]).unwrap_err().contains("too much memory"));
        assert!(check(&[&r"\w{30}(?=a)".repeat(200)]).unwrap_err().contains("alternatives and groups"));
        assert!(check(&[&r"\w{30}++".repeat(200)]).unwrap_err().contains("alternatives and groups"));
        assert!(check(&["a"; 17]).unwrap_err().contains("more than 16"));
        assert!(check(&[&"a".repeat(5000)]).unwrap_err().contains("5000 bytes"));
        assert!(check(&[&"a".repeat(4000)[..]; 3]).unwrap_err().contains("12000 bytes"));
        let mut literals = Expressions::default();
        literals.add("String", &"a".repeat(60_000)).unwrap();
        assert!(literals.add("String", &"a".repeat(60_000)).unwrap_err().contains("together"));
    }
}
