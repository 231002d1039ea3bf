//! The residual streams of all windows, layer by layer.
//!
//! ```text
//! ids -> embed -> [ window 0: features x tokens | window 1 | ... ]     in memory where they fit, else in a file
//!                       advance: one sub-layer over every window, in place
//!                       moments: what its linears multiply, added up window by window
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use llmpress_formats::{Error, Result};
use llmpress_model::{
    Cache, Model, Observer, Panels, Reads, SharedInput, Skips, SubLayer, Unobserved, rounded_inputs,
};

use crate::{Calibration, Drift, Extent, Moments};

/// Where streams may lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of memory that they may take.
    pub memory: u64,
    /// The file that holds them where they take more. It is removed at the end.
    pub file: PathBuf,
}

impl Room {
    /// The room of one of so many streams that are there at a time, whose file has a name of its own.
    #[must_use]
    pub fn share(&self, streams: u64, name: &str) -> Self {
        let mut file = self.file.clone();
        file.as_mut_os_string().push(".");
        file.as_mut_os_string().push(name);
        Self { memory: self.memory / streams.max(1), file }
    }
}

/// The residual streams of all windows before some layer.
#[derive(Debug)]
pub struct Streams {
    windows: usize,
    features: usize,
    tokens: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<Panels>),
    File { path: PathBuf, file: File },
}

impl Drop for Streams {
    fn drop(&mut self) {
        if let Store::File { path, .. } = &self.store {
            // What is left behind does no harm: the next run writes it anew.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Streams {
    /// The embeddings of all windows.
    ///
    /// # Errors
    /// Those of [`crate::check`]; an id beyond the vocabulary; a file that cannot be written.
    pub fn embed(model: &Model, calibration: &Calibration, room: &Room) -> Result<Self> {
        crate::check(model)?;
        let (windows, tokens) = (calibration.windows().len(), calibration.length());
        let mut streams = Self::empty(windows, model.config().hidden_size, tokens, room)?;
        for (window, ids) in calibration.windows().iter().enumerate() {
            streams.put(window, &model.embed(ids)?)?;
        }
        Ok(streams)
    }

    fn empty(windows: usize, features: usize, tokens: usize, room: &Room) -> Result<Self> {
        let store = if Self::bytes(windows, features, tokens) <= room.memory {
            Store::Memory(vec![Panels::default(); windows])
        } else {
            let path = room.file.clone();
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
            Store::File { file: file.map_err(|e| Error::io(&path, "create", e))?, path }
        };
        Ok(Self { windows, features, tokens, store })
    }

    /// Bytes of so many windows.
    pub fn bytes(windows: usize, features: usize, tokens: usize) -> u64 {
        [windows, features, tokens].iter().fold(4, |bytes: u64, &n| bytes.saturating_mul(n as u64))
    }

    /// Windows.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// Tokens of each.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Features of each token.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Bytes of memory that they take.
    pub fn memory(&self) -> u64 {
        match self.store {
            Store::Memory(_) => Self::bytes(self.windows, self.features, self.tokens),
            Store::File { .. } => 0,
        }
    }

    /// The stream of a window: features x tokens.
    ///
    /// # Errors
    /// No such window; a file that cannot be read.
    pub fn get(&mut self, window: usize, out: &mut Panels) -> Result<()> {
        if window >= self.windows {
            return Err(Error::Invalid(format!("window {window} of {}", self.windows)));
        }
        match &mut self.store {
            Store::Memory(all) => out.clone_from(&all[window]),
            Store::File { path, file } => {
                out.resize(self.features, self.tokens);
                seek(file, path, window, self.features * self.tokens)?;
                read_floats(file, path, out.data_mut())?;
            }
        }
        Ok(())
    }

    /// Takes another stream for a window.
    ///
    /// # Errors
    /// Another size; a file that cannot be written.
    pub fn put(&mut self, window: usize, stream: &Panels) -> Result<()> {
        if window >= self.windows || (stream.features(), stream.tokens()) != (self.features, self.tokens) {
            return Err(Error::Invalid(format!(
                "a stream of {} x {} is none of {} windows of {} x {}",
                stream.features(),
                stream.tokens(),
                self.windows,
                self.features,
                self.tokens
            )));
        }
        match &mut self.store {
            Store::Memory(all) => all[window].clone_from(stream),
            Store::File { path, file } => {
                seek(file, path, window, self.features * self.tokens)?;
                write_floats(file, path, stream.data())?;
            }
        }
        Ok(())
    }

    /// The same streams once more, where there is room for them.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn copy(&mut self, room: &Room) -> Result<Self> {
        let mut copy = Self::empty(self.windows, self.features, self.tokens, room)?;
        copy.take(self)?;
        Ok(copy)
    }

    /// Takes the values of other streams of the same windows.
    ///
    /// # Errors
    /// Another size; a file that cannot be read or written.
    pub fn take(&mut self, from: &mut Self) -> Result<()> {
        let mut window = Panels::default();
        for index in 0..from.windows {
            from.get(index, &mut window)?;
            self.put(index, &window)?;
        }
        Ok(())
    }

    /// Writes all windows in order, as little-endian F32: what [`Self::load`] reads. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn save(&mut self, to: &mut dyn Write, path: &Path) -> Result<()> {
        let mut window = Panels::default();
        for index in 0..self.windows {
            self.get(index, &mut window)?;
            write_floats(to, path, window.data())?;
        }
        Ok(())
    }

    /// Reads what [`Self::save`] wrote for the same calibration and model. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is too short.
    pub fn load(
        model: &Model,
        calibration: &Calibration,
        room: &Room,
        from: &mut dyn Read,
        path: &Path,
    ) -> Result<Self> {
        crate::check(model)?;
        let (windows, tokens) = (calibration.windows().len(), calibration.length());
        let mut streams = Self::empty(windows, model.config().hidden_size, tokens, room)?;
        let mut window = Panels::zeros(streams.features, tokens);
        for index in 0..windows {
            read_floats(from, path, window.data_mut())?;
            streams.put(index, &window)?;
        }
        Ok(streams)
    }

    /// Runs a sub-layer over every window. `progress` is told each.
    ///
    /// # Errors
    /// Weights or a file that cannot be read.
    pub fn advance(&mut self, model: &Model, site: SubLayer, progress: &mut dyn FnMut()) -> Result<()> {
        let mut cache = model.cache(self.tokens);
        let mut stream = Panels::default();
        for window in 0..self.windows {
            self.get(window, &mut stream)?;
            run(model, site, &mut stream, &mut cache, &mut Unobserved)?;
            self.put(window, &stream)?;
            progress();
        }
        Ok(())
    }

    /// The second moments of some inputs of one layer, over all windows, from the sub-layer on before which the streams are; those
    /// of an expert over the tokens that it sees. Inputs of one sub-layer alone may be of the second one, if the streams are past
    /// the first. `progress` is told each window.
    ///
    /// # Errors
    /// NaN or infinite activations: by tensor and window; weights or a file that cannot be read; more than fits into
    /// memory.
    pub fn moments(
        &mut self,
        model: &Model,
        inputs: &[(Tap<'_>, Extent)],
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<Moments>> {
        let moments = inputs
            .iter()
            .map(|(tap, extent)| Moments::new(tap.input.features, *extent))
            .collect::<Result<Vec<_>>>()?;
        let mut taps = Taps { inputs, moments, window: 0, error: None };
        let sites = || inputs.iter().map(|(tap, _)| tap.input.sub_layer);
        let (Some(first), Some(last)) = (sites().min(), sites().max()) else { return Ok(vec![]) };
        if sites().any(|site| layer_of(site) != layer_of(first)) {
            return Err(Error::Invalid("moments are gathered of one layer at a time".to_owned()));
        }
        let normed_only = first == last && inputs.iter().all(|(tap, _)| tap.input.reads == Reads::Normed);
        let mut cache = model.cache(self.tokens);
        let (mut stream, mut normed) = (Panels::default(), Panels::default());
        for window in 0..self.windows {
            taps.window = window;
            self.get(window, &mut stream)?;
            if normed_only {
                if model.normed(first, &stream, &mut normed) {
                    for (tap, _) in inputs {
                        if let Some(first) = tap.input.tensors.first() {
                            taps.linear_input(first, &normed);
                        }
                    }
                }
            } else {
                run(model, first, &mut stream, &mut cache, &mut taps)?;
                if last != first {
                    run(model, last, &mut stream, &mut cache, &mut taps)?;
                }
            }
            if let Some(error) = taps.error {
                return Err(error);
            }
            progress();
        }
        Ok(taps.moments.into_iter().map(Moments::close).collect())
    }
}

impl Streams {
    /// The second moments of one input, and how far it has drifted from the same input of the `original` model on its own
    /// streams. `progress` is told each window.
    ///
    /// # Errors
    /// Those of [`Self::moments`]; streams that are not of the same windows; an expert's input, whose tokens may be others.
    pub fn moments_and_drift(
        &mut self,
        model: &Model,
        original: (&Model, &mut Self),
        tap: Tap<'_>,
        progress: &mut dyn FnMut(),
    ) -> Result<(Moments, Drift)> {
        let (input, (base, others)) = (tap.input, original);
        if (self.windows, self.tokens, self.features) != (others.windows, others.tokens, others.features)
            || matches!(input.reads, Reads::ExpertTokens(_) | Reads::ExpertInner(_))
        {
            return Err(Error::Invalid(
                "drift is between equal windows, of what all tokens go through".to_owned(),
            ));
        }
        let inputs = [(tap, Extent::Full)];
        let moments = vec![Moments::new(input.features, Extent::Full)?];
        let mut taps = Taps { inputs: &inputs, moments, window: 0, error: None };
        let mut drift = Drift::new(input.features)?;
        let tensor = input.tensors.first().map_or("", String::as_str);
        let mut cache = model.cache(self.tokens);
        let (mut now, mut was) = (Seen::of(tensor), Seen::of(tensor));
        let mut stream = Panels::default();
        for window in 0..self.windows {
            taps.window = window;
            for (streams, model, seen) in [(&mut *self, model, &mut now), (&mut *others, base, &mut was)] {
                streams.get(window, &mut stream)?;
                if input.reads == Reads::Normed {
                    model.normed(input.sub_layer, &stream, &mut seen.input);
                } else {
                    run(model, input.sub_layer, &mut stream, &mut cache, seen)?;
                }
            }
            if let Some(bits) = tap.bits {
                now.input = rounded_inputs(&now.input, bits)
                    .map_err(|token| taps.wrong(tensor, &not_finite(token)))?;
            }
            taps.take(0, tensor, &now.input);
            if let Some(error) = taps.error {
                return Err(error);
            }
            drift.add(&now.input, &was.input)?;
            progress();
        }
        let moments = taps.moments.pop().map(Moments::close);
        Ok((moments.ok_or_else(|| Error::Invalid("no moments were gathered".to_owned()))?, drift))
    }
}

/// Keeps what one linear multiplies.
struct Seen<'a> {
    tensor: &'a str,
    input: Panels,
}

impl<'a> Seen<'a> {
    fn of(tensor: &'a str) -> Self {
        Self { tensor, input: Panels::default() }
    }
}

impl Observer for Seen<'_> {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        if weight == self.tensor {
            self.input.clone_from(input);
        }
    }
}

fn layer_of(site: SubLayer) -> usize {
    let (SubLayer::Attention(layer) | SubLayer::Mlp(layer)) = site;
    layer
}

/// One sub-layer over one window.
fn run(
    model: &Model,
    site: SubLayer,
    stream: &mut Panels,
    cache: &mut Cache,
    observer: &mut dyn Observer,
) -> Result<()> {
    let (layer, other) = match site {
        SubLayer::Attention(layer) => (layer, SubLayer::Mlp(layer)),
        SubLayer::Mlp(layer) => (layer, SubLayer::Attention(layer)),
    };
    cache.clear();
    cache.announce(stream.tokens());
    model.run_layers(layer..layer + 1, stream, cache, &Skips::from([other]), observer)
}

/// An input whose moments are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Tap<'a> {
    /// Which.
    pub input: &'a SharedInput,
    /// Bits to which it is quantised before it is multiplied; none: as it is.
    pub bits: Option<u8>,
}

impl<'a> From<&'a SharedInput> for Tap<'a> {
    fn from(input: &'a SharedInput) -> Self {
        Self { input, bits: None }
    }
}

/// Adds up what passes the first tensor of each input.
struct Taps<'a> {
    inputs: &'a [(Tap<'a>, Extent)],
    moments: Vec<Moments>,
    window: usize,
    error: Option<Error>,
}

impl Taps<'_> {
    /// What the product multiplies.
    fn take(&mut self, index: usize, tensor: &str, input: &Panels) {
        if let Err(e) = self.moments[index].add(input) {
            self.error = Some(self.wrong(tensor, &e.to_string()));
        }
    }

    fn wrong(&self, tensor: &str, what: &str) -> Error {
        Error::Invalid(format!(
            "the activations that {tensor} multiplies go wrong in calibration window {}: {what}: the model overflows on this \
             text, or its weights are damaged",
            self.window
        ))
    }
}

impl Observer for Taps<'_> {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        let wanted = |(tap, _): &(Tap<'_>, Extent)| tap.input.tensors.first().is_some_and(|t| t == weight);
        let Some(index) = self.inputs.iter().position(wanted).filter(|_| self.error.is_none()) else {
            return;
        };
        match self.inputs[index].0.bits {
            None => self.take(index, weight, input),
            Some(bits) => match rounded_inputs(input, bits) {
                Ok(rounded) => self.take(index, weight, &rounded),
                Err(token) => self.error = Some(self.wrong(weight, &not_finite(token))),
            },
        }
    }
}

/// Of a token that cannot be quantised.
fn not_finite(token: usize) -> String {
    format!("NaN, infinite or too large at token {token}")
}

fn seek(file: &mut File, path: &Path, window: usize, floats: usize) -> Result<()> {
    let at = (window as u64).saturating_mul(floats as u64 * 4);
    file.seek(SeekFrom::Start(at)).map_err(|e| Error::io(path, "seek in", e))?;
    Ok(())
}

/// Floats that go through a buffer at a time.
const PIECE: usize = 1 << 16;

fn write_floats(to: &mut dyn Write, path: &Path, floats: &[f32]) -> Result<()> {
    let mut bytes = Vec::with_capacity(4 * PIECE.min(floats.len()));
    for piece in floats.chunks(PIECE) {
        bytes.clear();
        piece.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
        to.write_all(&bytes).map_err(|e| Error::io(path, "write", e))?;
    }
    Ok(())
}

fn read_floats(from: &mut dyn Read, path: &Path, floats: &mut [f32]) -> Result<()> {
    let mut bytes = vec![0; 4 * PIECE.min(floats.len())];
    for piece in floats.chunks_mut(PIECE) {
        let bytes = &mut bytes[..4 * piece.len()];
        from.read_exact(bytes).map_err(|e| Error::io(path, "read", e))?;
        for (x, bytes) in piece.iter_mut().zip(bytes.chunks_exact(4)) {
            *x = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
    }
    Ok(())
}
