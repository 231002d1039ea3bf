//! The tensors that a pickle names. Nothing is run: a stack of plain values, and a list of what may be asked for.
//!
//! ```text
//! {name: _rebuild_tensor_v2(storage(type, key), offset, shape, strides, ...), ...}
//! ```
//!
//! Values lie in one list and hold each other by number, so that whatever a pickle repeats takes no more memory than it has opcodes.

use std::collections::BTreeMap;
use std::path::Path;

use super::dtype;
use crate::{Dtype, Error, Result};

/// A tensor as the pickle says it.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// Of its storage.
    pub(super) key: String,
    /// Elements before it in its storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// Arguments that count.
const MOST_ARGUMENTS: usize = 8;
/// Most dimensions of a tensor.
const MOST_DIMS: usize = 8;
/// Most values: a tensor takes some twenty.
const MOST_VALUES: usize = 8 << 20;

/// Number of a value.
type Id = usize;

/// A value on the stack.
#[derive(Debug, Clone)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    /// Floats and bytes: they are no part of a tensor.
    Other,
    Text(&'a str),
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        dtype: Option<Dtype>,
        key: &'a str,
    },
    Tensor {
        dtype: Dtype,
        key: &'a str,
        offset: u64,
        shape: Id,
        strides: Id,
    },
}

/// What a pickle may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    OrderedDict,
    /// A tensor of a storage.
    Rebuild,
    /// The same, and the dtype comes with it.
    RebuildTyped,
    Parameter,
    /// A storage of a dtype; of none where the tensor says it.
    Storage(Option<Dtype>),
    Dtype(Dtype),
}

/// The tensors of the state dict that a pickle is.
pub(super) fn tensors(path: &Path, bytes: &[u8]) -> Result<Vec<Tensor>> {
    let mut machine = Machine {
        path,
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
    };
    let top = machine.run()?;
    let Value::Dict(entries) = machine.value(top)? else {
        return Err(
            machine.corrupt("is no state dict: its pickle holds something else than names and tensors")
        );
    };
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        let Value::Text(name) = machine.value(*name)? else {
            return Err(machine.corrupt("is no state dict: it has a key that is no name"));
        };
        match machine.value(*value)? {
            Value::Tensor { dtype, key, offset, shape, strides } => {
                let tensor = Tensor {
                    name: (*name).to_owned(),
                    dtype: *dtype,
                    key: (*key).to_owned(),
                    offset: *offset,
                    shape: machine.sizes(*shape)?,
                    strides: machine.sizes(*strides)?,
                };
                // Of a key that is set twice, the last value counts.
                tensors.insert(*name, tensor);
            }
            other => {
                let what = format!(
                    "is {}, and a state dict holds tensors alone: save model.state_dict()",
                    other.kind()
                );
                return Err(Error::unsupported(path, Some(name), what));
            }
        }
    }
    Ok(tensors.into_values().collect())
}

impl Value<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Int(_) => "an integer",
            Self::Other => "a float or bytes",
            Self::Text(_) => "a text",
            Self::Sequence(_) => "a list",
            Self::Dict(_) => "a dict",
            Self::Global(_) => "a class",
            Self::Storage { .. } => "a storage",
            Self::Tensor { .. } => "a tensor",
        }
    }
}

struct Machine<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl<'a> Machine<'a> {
    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(self.path, None, format!("{what} (byte {} of data.pkl)", self.at))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(self.corrupt("has a pickle that ends too early")) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number(&mut self, width: usize) -> Result<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn text(&mut self, len: u64) -> Result<Value<'a>> {
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        std::str::from_utf8(bytes).map(Value::Text).map_err(|_| self.corrupt("has a name that is not UTF-8"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let line = self.take(len)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| self.corrupt("has a name that is not UTF-8"))
    }

    fn value(&self, id: Id) -> Result<&Value<'a>> {
        self.values.get(id).ok_or_else(|| self.corrupt("has a pickle that breaks its format"))
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id> {
        // What lies below a mark belongs to whoever set it.
        let bottom = self.marks.last().copied().unwrap_or(0);
        let top = if self.stack.len() > bottom { self.stack.pop() } else { None };
        top.ok_or_else(|| self.corrupt("has a pickle that takes more than there is"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err(self.corrupt("has a pickle without a mark")),
        }
    }

    fn memoize(&mut self, place: u64) -> Result<()> {
        let top =
            self.stack.last().copied().ok_or_else(|| self.corrupt("has a pickle that remembers nothing"))?;
        // Places are counted up.
        let place = usize::try_from(place).ok().filter(|place| *place <= self.memo.len());
        let place = place.ok_or_else(|| self.corrupt("has a pickle that remembers too much"))?;
        if self.memo.len() <= place {
            self.memo.resize(place + 1, None);
        }
        self.memo[place] = Some(top);
        Ok(())
    }

    fn recall(&mut self, place: u64) -> Result<()> {
        let known = usize::try_from(place).ok().and_then(|place| self.memo.get(place).copied().flatten());
        self.stack.push(known.ok_or_else(|| self.corrupt("has a pickle that remembers what it never saw"))?);
        Ok(())
    }

    fn run(&mut self) -> Result<Id> {
        loop {
            if self.values.len().max(self.stack.len()).max(self.marks.len()) > MOST_VALUES {
                let path = self.path.display();
                return Err(Error::Limit(format!("{path}: its pickle holds more than {MOST_VALUES} values")));
            }
            let opcode = self.take(1)?[0];
            match opcode {
                // PROTO, FRAME
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'.' => return self.pop(),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_to_mark()?),
                b'N' => self.push(Value::None),
                0x88 | 0x89 => self.push(Value::Bool),
                b'K' => {
                    let number = self.number(1)? as i64;
                    self.push(Value::Int(number));
                }
                b'M' => {
                    let number = self.number(2)? as i64;
                    self.push(Value::Int(number));
                }
                b'J' => {
                    let number = i64::from(self.number(4)? as u32 as i32);
                    self.push(Value::Int(number));
                }
                // LONG1: as many bytes as it says, of two's complement.
                0x8a => {
                    let width = self.number(1)? as usize;
                    let bytes = self.take(width)?;
                    let sign = if bytes.last().is_some_and(|last| last >> 7 == 1) { -1 } else { 0 };
                    let value = (bytes.len() <= 8)
                        .then(|| bytes.iter().rev().fold(sign, |n: i64, b| n << 8 | i64::from(*b)));
                    self.push(value.map_or(Value::Other, Value::Int));
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other);
                }
                // Texts, by the width of their length.
                b'X' | b'T' => self.counted(4, true)?,
                0x8c | b'U' => self.counted(1, true)?,
                0x8d => self.counted(8, true)?,
                b'C' => self.counted(1, false)?,
                b'B' => self.counted(4, false)?,
                0x8e => self.counted(8, false)?,
                b'}' => self.push(Value::Dict(Vec::new())),
                b']' | b')' => self.push(Value::Sequence(Vec::new())),
                b't' | b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Sequence(items));
                }
                0x85..=0x87 => {
                    let mut items = Vec::new();
                    for _ in 0..opcode - 0x84 {
                        items.push(self.pop()?);
                    }
                    items.reverse();
                    self.push(Value::Sequence(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.extend(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(items)?;
                }
                b'q' => {
                    let place = self.number(1)?;
                    self.memoize(place)?;
                }
                b'r' => {
                    let place = self.number(4)?;
                    self.memoize(place)?;
                }
                0x94 => self.memoize(self.memo.len() as u64)?,
                b'h' => {
                    let place = self.number(1)?;
                    self.recall(place)?;
                }
                b'j' => {
                    let place = self.number(4)?;
                    self.recall(place)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) = (self.value(module)?, self.value(name)?)
                    else {
                        return Err(self.corrupt("asks for something without a name"));
                    };
                    let (module, name) = (*module, *name);
                    self.global(module, name)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                // BUILD gives a dict attributes: `_metadata` of a state dict, which says versions of modules.
                b'b' => {
                    self.pop()?;
                    let top = self.stack.last().copied().ok_or_else(|| self.corrupt("builds nothing"))?;
                    if !matches!(self.value(top)?, Value::Dict(_)) {
                        return Err(self.corrupt("sets attributes of something that is no dict"));
                    }
                }
                other => {
                    let what =
                        format!("has a pickle with the opcode {other:#04x}, which no state dict needs");
                    return Err(Error::unsupported(self.path, None, what));
                }
            }
        }
    }

    /// A text or bytes after their length.
    fn counted(&mut self, width: usize, text: bool) -> Result<()> {
        let len = self.number(width)?;
        let value = if text {
            self.text(len)?
        } else {
            self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
            Value::Other
        };
        self.push(value);
        Ok(())
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<()> {
        let list = self.stack.last().and_then(|id| self.values.get_mut(*id));
        match list {
            Some(Value::Sequence(all)) => all.extend(items),
            _ => return Err(self.corrupt("appends to something that is no list")),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<Id>) -> Result<()> {
        if !items.len().is_multiple_of(2) {
            return Err(self.corrupt("has a key without a value"));
        }
        let dict = self.stack.last().and_then(|id| self.values.get_mut(*id));
        match dict {
            Some(Value::Dict(all)) => all.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            _ => return Err(self.corrupt("sets keys of something that is no dict")),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Global::Rebuild),
            ("torch._utils", "_rebuild_tensor_v3") => Some(Global::RebuildTyped),
            ("torch._utils", "_rebuild_parameter") => Some(Global::Parameter),
            ("torch" | "torch.storage", "UntypedStorage") => Some(Global::Storage(None)),
            ("torch", name) if name.ends_with("Storage") => {
                dtype(name).map(|dtype| Global::Storage(Some(dtype)))
            }
            ("torch", name) => dtype(name).map(Global::Dtype),
            _ => None,
        };
        let Some(global) = known else {
            let named = format!("{module}.{name}");
            let what = format!(
                "asks for {}, and only tensors are read: nothing of a pickle is run; save model.state_dict() alone, or as safetensors",
                crate::printable(&named)
            );
            return Err(Error::unsupported(self.path, None, what));
        };
        self.push(Value::Global(global));
        Ok(())
    }

    /// ("storage", type, key, location, elements)
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Value::Sequence(items) = self.value(id)? else {
            return Err(self.corrupt("names a storage in a way that torch does not"));
        };
        let (Some(&kind), Some(&class), Some(&key)) = (items.first(), items.get(1), items.get(2)) else {
            return Err(self.corrupt("names a storage in a way that torch does not"));
        };
        match (self.value(kind)?, self.value(class)?, self.value(key)?) {
            (Value::Text("storage"), Value::Global(Global::Storage(dtype)), Value::Text(key)) => {
                let storage = Value::Storage { dtype: *dtype, key };
                self.push(storage);
                Ok(())
            }
            _ => Err(self.corrupt("names a storage in a way that torch does not")),
        }
    }

    /// Calls what may be asked for.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, called) = (self.pop()?, self.pop()?);
        let (Value::Sequence(arguments), Value::Global(called)) =
            (self.value(arguments)?, self.value(called)?)
        else {
            return Err(self.corrupt("calls something that is no function"));
        };
        // What is asked for takes no more of them, however many there are.
        let (arguments, called) =
            (arguments.iter().take(MOST_ARGUMENTS).copied().collect::<Vec<Id>>(), *called);
        let made = match called {
            Global::OrderedDict if arguments.is_empty() => Value::Dict(Vec::new()),
            Global::Parameter => {
                let tensor =
                    arguments.first().copied().ok_or_else(|| self.corrupt("makes a parameter of nothing"))?;
                if !matches!(self.value(tensor)?, Value::Tensor { .. }) {
                    return Err(self.corrupt("makes a parameter of something that is no tensor"));
                }
                self.stack.push(tensor);
                return Ok(());
            }
            Global::Rebuild => self.tensor(&arguments, None)?,
            Global::RebuildTyped => {
                let id = arguments
                    .get(6)
                    .copied()
                    .ok_or_else(|| self.corrupt("makes a tensor without a dtype"))?;
                let Value::Global(Global::Dtype(dtype)) = self.value(id)? else {
                    return Err(self.corrupt("makes a tensor without a dtype"));
                };
                self.tensor(&arguments, Some(*dtype))?
            }
            _ => return Err(self.corrupt("calls something that is no function")),
        };
        self.push(made);
        Ok(())
    }

    /// storage, offset, shape, strides, ...
    fn tensor(&self, arguments: &[Id], typed: Option<Dtype>) -> Result<Value<'a>> {
        let [storage, offset, shape, strides, ..] = *arguments else {
            return Err(self.corrupt("makes a tensor of too little"));
        };
        let Value::Storage { dtype, key } = self.value(storage)? else {
            return Err(self.corrupt("makes a tensor of something that is no storage"));
        };
        let Some(dtype) = typed.or(*dtype) else {
            return Err(self.corrupt("makes a tensor without a dtype"));
        };
        Ok(Value::Tensor { dtype, key, offset: self.size(offset)?, shape, strides })
    }

    fn size(&self, id: Id) -> Result<u64> {
        match self.value(id)? {
            Value::Int(number) => u64::try_from(*number).map_err(|_| self.corrupt("has a size below 0")),
            _ => Err(self.corrupt("has a size that is no number")),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<u64>> {
        match self.value(id)? {
            Value::Sequence(all) if all.len() <= MOST_DIMS => all.iter().map(|id| self.size(*id)).collect(),
            Value::Sequence(all) => Err(self.corrupt(&format!(
                "has a tensor of {} dimensions, and at most {MOST_DIMS} are read",
                all.len()
            ))),
            _ => Err(self.corrupt("has a shape that is none")),
        }
    }
}
