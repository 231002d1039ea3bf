//! JSON as Python's `json` writes it: `NaN`, `Infinity` and `-Infinity` stand where no JSON value is.

use serde::de::DeserializeOwned;

/// Parses JSON; the three values that only Python writes are read as `null`.
pub fn python_json<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(error) => match without_constants(bytes) {
            Some(plain) => serde_json::from_slice(&plain),
            None => Err(error),
        },
    }
}

/// The text with `null` in place of Python's constants; `None` if it has none of them.
fn without_constants(bytes: &[u8]) -> Option<Vec<u8>> {
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
        let constant =
            [&b"NaN"[..], b"-Infinity", b"Infinity"].into_iter().find(|c| bytes[at..].starts_with(c));
        match constant {
            Some(constant) => {
                let out = out.get_or_insert_with(|| Vec::with_capacity(bytes.len() + 8));
                out.extend_from_slice(&bytes[copied..at]);
                out.extend_from_slice(b"null");
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
}
