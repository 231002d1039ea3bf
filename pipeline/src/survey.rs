//! The first pass over a unit: statistics that decide its encoding and the exact size of its parts.
//!
//! ```text
//! source pieces --(all threads)--> histograms --> code or window --> component sizes, or why not
//! ```

use llmpress_entropy::{dfloat11, fixed12};
use llmpress_formats::Checkpoint;
use llmpress_formats::encoding::{self, ComponentSpec, Encoding};

use crate::encode::Work;
use crate::plan::PlannedUnit;
use crate::source::UnitSource;
use crate::{Method, Result};

/// A unit whose encoding is settled.
#[derive(Debug)]
pub(crate) struct SettledUnit<'a> {
    pub(crate) name: String,
    pub(crate) source: UnitSource<'a>,
    pub(crate) coding: Coding,
    pub(crate) fallback: Option<String>,
}

/// The encoding of a unit and what its encoder needs.
#[derive(Debug)]
pub(crate) enum Coding {
    Raw { spec: Vec<ComponentSpec> },
    Planes { split: encoding::planes::Split, spec: Vec<ComponentSpec> },
    Dfloat11(Box<Dfloat11Coding>),
    Fixed12 { grid: fixed12::Grid, base: i16, spec: Vec<ComponentSpec> },
}

#[derive(Debug)]
pub(crate) struct Dfloat11Coding {
    pub(crate) code: dfloat11::Code,
    pub(crate) layout: dfloat11::Layout,
    /// Where each piece starts in the stream.
    pub(crate) starts: Vec<dfloat11::Position>,
    pub(crate) splits: Vec<i64>,
    pub(crate) spec: Vec<ComponentSpec>,
}

impl Coding {
    pub(crate) fn encoding(&self) -> Encoding {
        match self {
            Self::Raw { .. } => Encoding::Raw,
            Self::Planes { split, .. } => Encoding::Planes { rotate: split.rotate },
            Self::Dfloat11(_) => Encoding::Dfloat11,
            Self::Fixed12 { base, .. } => Encoding::Fixed12 { base: *base },
        }
    }

    /// The components; those of `planes` are upper bounds.
    pub(crate) fn spec(&self) -> &[ComponentSpec] {
        match self {
            Self::Raw { spec } | Self::Planes { spec, .. } | Self::Fixed12 { spec, .. } => spec,
            Self::Dfloat11(d) => &d.spec,
        }
    }
}

/// Cuts a run of bytes into pieces.
pub(crate) fn pieces(bytes: u64, piece: usize) -> impl Iterator<Item = (u64, usize)> {
    let piece = piece.max(1) as u64;
    (0..bytes.div_ceil(piece)).map(move |i| (i * piece, (bytes - i * piece).min(piece) as usize))
}

/// Settles the encoding of a planned unit. A unit that its encoding cannot hold, or would not shrink,
/// becomes raw tensors with the reason.
pub(crate) fn settle<'a>(
    checkpoint: &'a Checkpoint,
    planned: &PlannedUnit,
    work: Work<'_>,
) -> Result<Vec<SettledUnit<'a>>> {
    let source = UnitSource::new(checkpoint, &planned.tensors)?;
    let settled = match planned.method {
        Method::Raw => Ok(None),
        Method::Planes => {
            let tensor = checkpoint.tensor(&planned.name)?;
            let split = encoding::planes::split(tensor.dtype);
            let spec = encoding::planes::components(tensor.bytes, split.width, tensor.bytes);
            Ok(Some(Coding::Planes { split, spec }))
        }
        Method::Dfloat11 => dfloat11_coding(&source, work)?,
        Method::Fixed12 => fixed12_coding(checkpoint, &planned.name, &source, work)?,
    };
    let reason = match settled {
        Ok(Some(coding)) => {
            return Ok(vec![SettledUnit { name: planned.name.clone(), source, coding, fallback: None }]);
        }
        Ok(None) => None,
        Err(reason) => Some(reason),
    };
    planned
        .tensors
        .iter()
        .map(|name| {
            let tensor = checkpoint.tensor(name)?;
            Ok(SettledUnit {
                name: name.clone(),
                source: UnitSource::new(checkpoint, std::slice::from_ref(name))?,
                coding: Coding::Raw { spec: encoding::raw::components(tensor.dtype, &tensor.shape) },
                fallback: reason.clone(),
            })
        })
        .collect()
}

/// A coding, or why the encoding does not do for this unit.
type Settled = Result<Option<Coding>, String>;

fn would_not_shrink(spec: &[ComponentSpec], source_bytes: u64) -> Option<String> {
    let sizes = spec.iter().map(|c| c.dtype.byte_len(&c.shape));
    let bytes = sizes.sum::<Option<u64>>().unwrap_or(u64::MAX);
    (bytes >= source_bytes).then(|| format!("would take {bytes} bytes instead of {source_bytes}"))
}

fn dfloat11_coding(source: &UnitSource<'_>, work: Work<'_>) -> Result<Settled> {
    let histograms: Vec<dfloat11::Histogram> = histograms(source, work, |words| {
        let mut histogram = dfloat11::Histogram::new();
        histogram.add(words);
        histogram
    })?;
    let mut total = dfloat11::Histogram::new();
    for histogram in &histograms {
        total.merge(histogram);
    }
    let code = match dfloat11::Code::build(&total) {
        Ok(code) => code,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let layout = match dfloat11::Layout::new(&code, &total) {
        Ok(layout) => layout,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let mut at = dfloat11::Position::default();
    let starts: Vec<dfloat11::Position> = histograms
        .iter()
        .map(|histogram| {
            let start = at;
            at.element += histogram.total();
            at.bit += code.encoded_bits(histogram);
            start
        })
        .collect();
    if code.lengths().contains(&1) {
        let most = most_block_symbols(source, &code, &layout, &starts, work.piece_bytes)?;
        if most > dfloat11::MAX_BLOCK_SYMBOLS {
            return Ok(Err(dfloat11::Unrepresentable::BlockSymbols(most).to_string()));
        }
    }
    let tensors = source.tensors();
    let splits = encoding::dfloat11::split_positions(tensors.iter().map(|t| t.bytes / 2));
    let spec = encoding::dfloat11::components(&layout, code.luts().len() as u64, tensors.len() as u64);
    Ok(match would_not_shrink(&spec, source.bytes()) {
        Some(reason) => Err(reason),
        None => Ok(Some(Coding::Dfloat11(Box::new(Dfloat11Coding { code, layout, starts, splits, spec })))),
    })
}

/// The most symbols of a block. Only a code with a word of one bit can exceed what the official decoder
/// has room for, so the extra pass is rare.
fn most_block_symbols(
    source: &UnitSource<'_>,
    code: &dfloat11::Code,
    layout: &dfloat11::Layout,
    starts: &[dfloat11::Position],
    piece_bytes: usize,
) -> Result<u64> {
    let mut assembler = dfloat11::Assembler::new(layout);
    let (mut piece, mut sections) = (dfloat11::Piece::default(), dfloat11::Sections::default());
    let mut words: Vec<u16> = Vec::new();
    for ((offset, len), start) in pieces(source.bytes(), piece_bytes & !1).zip(starts) {
        words.resize(len / 2, 0);
        source.read(offset, bytemuck::cast_slice_mut(&mut words))?;
        dfloat11::encode_piece(code, *start, &words, &mut piece);
        assembler.push(&piece, &mut sections);
        sections = dfloat11::Sections::default();
    }
    Ok(assembler.most_block_symbols(layout.elements))
}

fn fixed12_coding(
    checkpoint: &Checkpoint,
    name: &str,
    source: &UnitSource<'_>,
    work: Work<'_>,
) -> Result<Settled> {
    let Some(grid) = encoding::fixed12::grid(&checkpoint.tensor(name)?.shape) else {
        return Ok(Err("is not a matrix".to_owned()));
    };
    let histograms = histograms(source, work, |words| {
        let mut histogram = fixed12::Histogram::new();
        histogram.add(words);
        histogram
    })?;
    let mut total = fixed12::Histogram::new();
    for histogram in &histograms {
        total.merge(histogram);
    }
    let window = total.best_window();
    if window.escapes > u64::from(u32::MAX) {
        return Ok(Err(format!("{} weights lie outside the exponent window", window.escapes)));
    }
    let spec = encoding::fixed12::components(&grid, window.escapes);
    Ok(match would_not_shrink(&spec, source.bytes()) {
        Some(reason) => Err(format!("{reason}: {} weights lie outside the exponent window", window.escapes)),
        None => Ok(Some(Coding::Fixed12 { grid, base: window.base, spec })),
    })
}

/// One histogram a piece.
fn histograms<H: Send>(
    source: &UnitSource<'_>,
    work: Work<'_>,
    count: impl Fn(&[u16]) -> H + Sync + Send,
) -> Result<Vec<H>> {
    let all: Vec<(u64, usize)> = pieces(source.bytes(), work.piece_bytes & !1).collect();
    work.threads.map(all, Vec::<u16>::new, |words, (offset, len)| {
        words.resize(len / 2, 0);
        source.read(offset, bytemuck::cast_slice_mut(words))?;
        let histogram = count(words);
        work.progress.advance(len as u64);
        Ok(histogram)
    })
}
