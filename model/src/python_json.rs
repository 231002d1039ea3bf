//! The `tojson` filter of chat templates: what Python's `json.dumps(value, ensure_ascii=False)` writes.

use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Levels of nesting and columns of indentation that are written.
const MAX_DEPTH: usize = 64;
const MAX_INDENT: usize = 16;

/// A value as JSON, on one line or with `indent` spaces a level.
pub(crate) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    options.assert_all_used()?;
    if indent.is_some_and(|n| n > MAX_INDENT) {
        return Err(invalid(format!("tojson: indent is at most {MAX_INDENT}")));
    }
    let spaces = " ".repeat(indent.unwrap_or(0));
    let formatter = PythonFormatter {
        pretty: indent.map(|_| PrettyFormatter::with_indent(spaces.as_bytes())),
        ascii,
        depth: 0,
    };
    let mut serializer =
        serde_json::Serializer::with_formatter(Charged { state, bytes: Vec::new() }, formatter);
    value.serialize(&mut serializer).map_err(|e| invalid(format!("tojson: {e}")))?;
    String::from_utf8(serializer.into_inner().bytes).map_err(|e| invalid(format!("tojson: {e}")))
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Pays for what is written: a small value can be large as text.
struct Charged<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
}

impl Write for Charged<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.state.consume_fuel(1 + bytes.len() as u64 / 64).map_err(io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct PythonFormatter<'a> {
    pretty: Option<PrettyFormatter<'a>>,
    ascii: bool,
    depth: usize,
}

impl PythonFormatter<'_> {
    fn enter(&mut self) -> io::Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(io::Error::other(format!("is nested more than {MAX_DEPTH} deep")));
        }
        Ok(())
    }

    fn separator<W: ?Sized + Write>(first: bool, writer: &mut W) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

/// Forwards to the pretty formatter where there is one.
macro_rules! pretty_or {
    ($self:ident.$method:ident($($argument:expr),*), $plain:expr) => {
        match &mut $self.pretty {
            Some(pretty) => pretty.$method($($argument),*),
            None => $plain,
        }
    };
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.enter()?;
        pretty_or!(self.begin_array(writer), writer.write_all(b"["))
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth -= 1;
        pretty_or!(self.end_array(writer), writer.write_all(b"]"))
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        pretty_or!(self.begin_array_value(writer, first), Self::separator(first, writer))
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        pretty_or!(self.end_array_value(writer), Ok(()))
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.enter()?;
        pretty_or!(self.begin_object(writer), writer.write_all(b"{"))
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth -= 1;
        pretty_or!(self.end_object(writer), writer.write_all(b"}"))
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        pretty_or!(self.begin_object_key(writer, first), Self::separator(first, writer))
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        pretty_or!(self.end_object_value(writer), Ok(()))
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                write!(writer, "{c}")?;
            } else {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }
}
