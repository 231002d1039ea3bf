//! JSON as Python's `json` writes it: `NaN`, `Infinity` and `-Infinity` stand where no JSON value is.

use serde::de::DeserializeOwned;

/// Parses JSON; the three values that only Python writes are read as `null`.
pub fn python_json<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(error) => match with_constants(bytes, ["null"; 3]) {
            Some(plain) => serde_json::from_slice(&plain),
            None => Err(error),
        },
    }
}

/// JSON with numbers in place of the two infinities, for readers of another crate: a positive one becomes the largest of
/// 64 bits, which is a count too, a negative one the lowest of F64, and what is not a number `null`. `None` if the text has
/// none of them.
pub fn finite_json(bytes: &[u8]) -> Option<Vec<u8>> {
    with_constants(bytes, ["null", "-1.7976931348623157e308", "18446744073709551615"])
}

/// Python's constants.
const CONSTANTS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];

/// The text with these in place of Python's constants; `None` if it has none of them.
fn with_constants(bytes: &[u8], values: [&str; 3]) -> Option<Vec<u8>> {
    let mut out: Option<Vec<u8>> = None;
    let (mut at, mut copied) = (0, 0);
    while at < bytes.len() {
        if bytes[at] == b'"' {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
            continue;
        }
        let found = CONSTANTS.iter().zip(values).find(|(c, _)| bytes[at..].starts_with(c.as_bytes()));
        match found {
            Some((constant, value)) => {
                let out = out.get_or_insert_with(|| Vec::with_capacity(bytes.len() + 8));
                out.extend_from_slice(&bytes[copied..at]);
                out.extend_from_slice(value.as_bytes());
                at += constant.len();
                copied = at;
            }
            None => at += 1,
        }
    }
    let mut out = out?;
    out.extend_from_slice(bytes.get(copied..).unwrap_or_default());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        let text = br#"{"a": Infinity, "b": [-Infinity, NaN, 1.5], "c": "NaN \" Infinity", "NaN": -3}"#;
        let value: serde_json::Value = python_json(text).unwrap();
        let expected =
            serde_json::json!({"a": null, "b": [null, null, 1.5], "c": "NaN \" Infinity", "NaN": -3});
        assert_eq!(value, expected);
        for wrong in ["{", "NaNa", "[Infinity", "{\"a\": NaN NaN}", "\"\\", "[1, nan]"] {
            assert!(python_json::<serde_json::Value>(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn infinities_become_numbers_for_readers_that_want_them() {
        let text = br#"{"count": Infinity, "scores": [-Infinity, Infinity, NaN], "NaN": "-Infinity"}"#;
        let finite = finite_json(text).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&finite).unwrap();
        let expected =
            serde_json::json!({"count": u64::MAX, "scores": [f64::MIN, u64::MAX, null], "NaN": "-Infinity"});
        assert_eq!(value, expected);
        assert!(finite_json(br#"{"a": "NaN", "b": 1}"#).is_none());
    }
}
