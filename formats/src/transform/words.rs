//! Lists of 32-bit words, in JSON eight lower-case hexadecimal digits each: their bits from the most significant on.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Scales in single precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scales(Vec<u32>);

impl Scales {
    /// Of values.
    pub fn new(values: &[f32]) -> Self {
        Self(values.iter().map(|s| s.to_bits()).collect())
    }

    /// The values.
    pub fn values(&self) -> Vec<f32> {
        self.0.iter().map(|bits| f32::from_bits(*bits)).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// For each place what stood where before. That it names each place once is for whoever knows how many there are to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order(Vec<u32>);

impl Order {
    /// Of places.
    pub fn new(places: Vec<u32>) -> Self {
        Self(places)
    }

    /// The places.
    pub fn places(&self) -> &[u32] {
        &self.0
    }
}

impl Serialize for Scales {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        write(&self.0, s)
    }
}

impl<'de> Deserialize<'de> for Scales {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        read(d, "scales").map(Self)
    }
}

impl Serialize for Order {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        write(&self.0, s)
    }
}

impl<'de> Deserialize<'de> for Order {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        read(d, "an order's places").map(Self)
    }
}

fn write<S: Serializer>(words: &[u32], s: S) -> Result<S::Ok, S::Error> {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(8 * words.len());
    for bits in words {
        write!(text, "{bits:08x}").map_err(serde::ser::Error::custom)?;
    }
    s.serialize_str(&text)
}

fn read<'de, D: Deserializer<'de>>(d: D, what: &str) -> Result<Vec<u32>, D::Error> {
    let text = String::deserialize(d)?;
    let wrong =
        || serde::de::Error::custom(format!("{what} must be eight lower-case hexadecimal digits each"));
    if !text.len().is_multiple_of(8) || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(wrong());
    }
    // Every digit is one byte.
    let digits = |at: usize| text.get(at..at + 8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    (0..text.len()).step_by(8).map(|at| digits(at).ok_or_else(wrong)).collect()
}
