//! Text to token ids and back.
//!
//! ```text
//! tokenizer.json ----------------------------> encode, decode
//! tokenizer_config.json, special_tokens_map.json --> BOS, and whether it is added by default
//! generation_config.json, config.json ------------> EOS
//! ```

mod charsmap;
mod deadline;
mod expressions;
mod growth;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use llmpress_formats::{CONFIG_FILE, Config, Error, Result, finite_json, read_small_file};
use serde_json::Value;
use tokenizers::ModelWrapper;

use self::deadline::{NoResult, within};
use self::growth::{Growth, Rules};
use crate::special_tokens::{TOKENIZER_CONFIG_FILE, read_object, special_tokens};

const TOKENIZER_FILE: &str = "tokenizer.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";
/// The largest published ones have some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Encoding takes some 120 bytes of memory for a byte of text.
const MAX_TEXT_BYTES: usize = 64 << 20;
/// What a tokenizer's own rules may make of a text on the way.
const MAX_GROWN_BYTES: f64 = 4.0 * MAX_TEXT_BYTES as f64;
/// Patterns look ahead after white space. Far longer runs end their matching (at a million steps back), and the rest
/// of the text would silently become other tokens.
const MAX_WHITE_SPACE: usize = 100_000;
/// Seconds that a tokenizer may take for anything, and bytes for which it may take one more. They encode some MB a
/// second and are opened faster.
const SECONDS: u64 = 10;
const BYTES_A_SECOND: usize = 128 << 10;

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: Arc<tokenizers::Tokenizer>,
    /// Whether a thread still works for it that took too long.
    stuck: AtomicBool,
    growth: Growth,
    bos: Option<u32>,
    adds_bos: bool,
    eos: Vec<u32>,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint's directory. Truncation, padding and BPE dropout are switched off.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or one of the files cannot be read or is damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER_FILE);
        let bytes = match read_small_file(&path, MAX_TOKENIZER_BYTES) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(missing(dir));
            }
            other => other?,
        };
        let stuck = AtomicBool::new(false);
        let (file, size) = (path.clone(), bytes.len());
        let (inner, growth) = ends(&path, &stuck, size, move || load(&file, &bytes))?;
        let inner = Arc::new(inner);
        let mut tokenizer = Self { path, inner, stuck, growth, bos: None, adds_bos: false, eos: Vec::new() };
        let special = special_tokens(dir)?;
        let id = |name: &str| special.get(name).and_then(|token| tokenizer.inner.token_to_id(token));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        tokenizer.bos = bos;
        tokenizer.eos = stop_ids(dir)?;
        tokenizer.eos.extend(eos.filter(|id| !tokenizer.eos.contains(id)));
        if let Some(bos) = bos {
            let config = read_object(&dir.join(TOKENIZER_CONFIG_FILE))?.unwrap_or_default();
            tokenizer.adds_bos = match config.get("add_bos_token").and_then(Value::as_bool) {
                Some(told) => told,
                None => tokenizer.post_processor_adds(bos)?,
            };
        }
        Ok(tokenizer)
    }

    /// The ids of a text, without special tokens around it. Special tokens written out in the text become
    /// their ids, as in a rendered chat template.
    ///
    /// # Errors
    /// The text is larger than 64 MiB or has more than 100 000 characters of white space in a row, the tokenizer
    /// has no token for a part of it, or takes some ten seconds and one for every 128 KiB. In the last case a thread goes
    /// on without a result, and the tokenizer takes no more texts.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::Limit(format!(
                "a text of {} bytes is to be encoded at once, the most is {MAX_TEXT_BYTES}: cut it",
                text.len()
            )));
        }
        self.check_growth(text.len(), self.growth.encoding)?;
        if let Some(at) = long_white_space(text) {
            return Err(Error::Limit(format!(
                "the text has more than {MAX_WHITE_SPACE} characters of white space in a row from byte {at}: shorten them"
            )));
        }
        let (inner, file, owned) = (self.inner.clone(), self.path.clone(), text.to_owned());
        ends(&self.path, &self.stuck, text.len(), move || {
            guarded(&file, || Ok(inner.encode_fast(owned, false)?.get_ids().to_vec()))
        })
    }

    /// The ids of a prompt: after the BOS where `add_bos` asks for it, the tokenizer has one, and the text does
    /// not start with it already.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_prompt(&self, text: &str, add_bos: bool) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.bos.filter(|&bos| add_bos && ids.first() != Some(&bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The text of ids. Special tokens are left out if `skip_special_tokens`; ids of no token always are.
    ///
    /// # Errors
    /// The tokenizer's decoder fails, or takes as long as [`Self::encode`] may at most.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let bytes = ids.iter().filter_map(|id| self.inner.id_to_token(*id)).map(|token| token.len()).sum();
        self.check_growth(bytes, self.growth.decoding)?;
        if !self.growth.decoder_searches {
            return guarded(&self.path, || self.inner.decode(ids, skip_special_tokens));
        }
        let (inner, file, ids) = (self.inner.clone(), self.path.clone(), ids.to_vec());
        ends(&self.path, &self.stuck, bytes, move || {
            guarded(&file, || inner.decode(&ids, skip_special_tokens))
        })
    }

    /// Decodes ids one after the other; special tokens are left out.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), emitted: 0 }
    }

    /// Number of tokens, the added ones included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The beginning-of-sequence token, if the tokenizer has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether a text is encoded with a BOS before it by default: as `add_bos_token` says, or else as
    /// `tokenizer.json`'s post-processor does.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The tokens that end a sequence: those of `generation_config.json` (or else `config.json`), then the
    /// tokenizer's own `eos_token`.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Refuses a text that the tokenizer's rules could make too long.
    fn check_growth(&self, bytes: usize, growth: f64) -> Result<()> {
        if bytes as f64 * growth <= MAX_GROWN_BYTES {
            return Ok(());
        }
        Err(Error::unsupported(
            &self.path,
            None,
            format!(
                "can make a text {growth:.0} times as long, and one of {bytes} bytes is to go through it: give less text, or \
                 copy the file from the original model again"
            ),
        ))
    }

    fn post_processor_adds(&self, bos: u32) -> Result<bool> {
        let ids =
            |special| guarded(&self.path, || Ok(self.inner.encode_fast("a", special)?.get_ids().to_vec()));
        Ok(ids(true)?.first() == Some(&bos) && ids(false)?.first() != Some(&bos))
    }
}

/// Text that grows with the ids. A character whose bytes are spread over several tokens comes out whole.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of the last text and those after it: decoders treat the first token of a text differently.
    ids: Vec<u32>,
    /// How many of them are in the text already.
    emitted: usize,
}

impl DecodeStream<'_> {
    /// More tokens than any character needs: what is still no character then never becomes one.
    const MOST_PENDING: usize = 32;

    /// Adds an id; returns the text that it completes.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        self.next_text(self.ids.len() - self.emitted >= Self::MOST_PENDING)
    }

    /// The rest at the end, where incomplete characters are U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<Option<String>> {
        self.next_text(true)
    }

    fn next_text(&mut self, incomplete_too: bool) -> Result<Option<String>> {
        let before = self.tokenizer.decode(&self.ids[..self.emitted], true)?;
        let all = self.tokenizer.decode(&self.ids, true)?;
        let new = match all.strip_prefix(&before) {
            Some(new) => new,
            // Only after incomplete bytes: the decoder sees them anew together with the next ones.
            None => all.get(before.len()..).unwrap_or_default(),
        };
        if new.is_empty() || (new.ends_with(char::REPLACEMENT_CHARACTER) && !incomplete_too) {
            return Ok(None);
        }
        let new = new.to_owned();
        self.ids.drain(..self.emitted);
        self.emitted = self.ids.len();
        Ok(Some(new))
    }
}

/// Reads a tokenizer, and how long its rules make a text.
fn load(path: &Path, bytes: &[u8]) -> Result<(tokenizers::Tokenizer, Growth)> {
    // Python writes what is no JSON.
    let bytes = match finite_json(bytes) {
        Some(finite) => Cow::Owned(finite),
        None => Cow::Borrowed(bytes),
    };
    // The tokenizer's own code does not survive every error of syntax.
    let rules = serde_json::from_slice::<Rules>(&bytes).map_err(|e| {
        Error::corrupt(path, None, format!("is not valid JSON: {e}: copy it from the original model again"))
    })?;
    let growth = rules.growth().map_err(|what| Error::unsupported(path, None, what))?;
    let inner = guarded(path, || {
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)?;
        inner.with_truncation(None)?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        Ok(inner)
    })?;
    Ok((inner, growth))
}

/// Runs the tokenizer's code for as long as so many bytes may take.
fn ends<T: Send + 'static>(
    path: &Path,
    stuck: &AtomicBool,
    bytes: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match within(SECONDS + (bytes / BYTES_A_SECOND) as u64, stuck, work) {
        Ok(result) => result,
        Err(NoResult::Late(seconds)) => Err(Error::unsupported(
            path,
            None,
            format!("takes more than {seconds} s for {bytes} bytes: copy it from the original model again"),
        )),
        Err(NoResult::NoThread(why)) => Err(Error::Limit(format!("no thread for the tokenizer: {why}"))),
    }
}

/// Runs the tokenizer's code, whose asserts are no answer to a damaged file.
fn guarded<T>(path: &Path, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::corrupt(path, None, format!("{e}: copy it from the original model again"))),
        Err(_) => {
            Err(Error::corrupt(path, None, "breaks the tokenizer: copy it from the original model again"))
        }
    }
}

/// Where a run of too much white space starts.
fn long_white_space(text: &str) -> Option<usize> {
    let (mut start, mut length) = (0, 0);
    for (at, c) in text.char_indices() {
        if !c.is_whitespace() {
            length = 0;
            continue;
        }
        if length == 0 {
            start = at;
        }
        length += 1;
        if length > MAX_WHITE_SPACE {
            return Some(start);
        }
    }
    None
}

fn missing(dir: &Path) -> Error {
    if dir.is_file() {
        return Error::Invalid(format!(
            "{}: its metadata make no {TOKENIZER_FILE}, so text cannot be encoded: put that of the original model beside the file",
            dir.display()
        ));
    }
    let found: Vec<&str> = ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"]
        .into_iter()
        .filter(|file| dir.join(file).is_file())
        .collect();
    let only = if found.is_empty() { String::new() } else { format!("only {}, ", found.join(", ")) };
    Error::Invalid(format!(
        "{}: there is no {TOKENIZER_FILE}, {only}so text cannot be encoded: copy it from the original model, or make \
         it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        dir.display()
    ))
}

/// `eos_token_id` of the generation configuration, or else of the model's.
fn stop_ids(dir: &Path) -> Result<Vec<u32>> {
    const KEY: &str = "eos_token_id";
    let path = dir.join(GENERATION_CONFIG_FILE);
    let generation = read_object(&path)?.unwrap_or_default();
    match generation.get(KEY) {
        Some(value) if !value.is_null() => token_ids(&path, KEY, value),
        _ => match Config::read(dir)?.as_ref().and_then(|config| config.get(KEY)) {
            Some(value) if !value.is_null() => token_ids(&dir.join(CONFIG_FILE), KEY, value),
            _ => Ok(Vec::new()),
        },
    }
}

fn token_ids(path: &Path, key: &str, value: &Value) -> Result<Vec<u32>> {
    let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let ids = values.iter().map(|v| v.as_u64().and_then(|id| u32::try_from(id).ok()));
    let ids = ids.collect::<Option<Vec<u32>>>().ok_or_else(|| {
        Error::corrupt(path, None, format!("{key} must be a token id or a list of token ids, not {value}"))
    })?;
    let mut seen = BTreeSet::new();
    Ok(ids.into_iter().filter(|&id| seen.insert(id)).collect())
}
