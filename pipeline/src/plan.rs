//! The plan: what becomes of every tensor, from headers alone.
//!
//! ```text
//! tensors -> units (one encoding each) -> shards (bounded by their source bytes, in source order)
//! ```
//!
//! A shard is a unit of work: what a plan and its number are enough for ([`Spread`](crate::Spread)).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use llmpress_formats::encoding::lowrank::Base;
use llmpress_formats::{Checkpoint, Dtype, Encoding, METADATA_KEY, QuantizeSite, Tensor, Transform, Unit};
use llmpress_model::{GpuNeeds, Model};
use serde::{Deserialize, Serialize};

use crate::budget::{Budget, Needs};
use crate::fingerprint::fingerprint;
use crate::foreseen::in_fixed12;
use crate::method::room::{Asked, missing_tensor};
use crate::method::{kept_unit, plain_values};
use crate::pass::Pass;
use crate::recipe::Compiled;
use crate::{Error, Method, QuantiseForecast, Recipe, Request, Result};

/// Version of the plan's JSON.
const PLAN_VERSION: u32 = 2;

/// What is going to happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of this description.
    pub plan_version: u32,
    /// Version of llmpress, which alone carries it out.
    pub version: String,
    /// The checkpoint that it is of: a directory, or a name on the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The base that tensors are stored by: a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The recipe it carries out.
    pub recipe: Recipe,
    /// Most source bytes of a shard (a larger unit has one of its own).
    pub max_shard_bytes: u64,
    /// Digest of everything that the output depends on and that headers tell.
    pub fingerprint: String,
    /// Bytes of all tensors of the source when decoded.
    pub source_bytes: u64,
    /// Expected bytes of the output's tensors.
    pub expected_bytes: u64,
    /// Passes that are still to be worked out. Where there are any, units and sizes are those of a checkpoint that loses as
    /// much from its end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passes: Vec<PlannedPass>,
    /// The first of them that goes by the whole model: one machine runs it before anybody can make shards. Where there is none, every
    /// shard is made by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs_whole_model: Option<String>,
    /// Texts that the output gets beside the source's files, by name: the rankings of prunings.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
    /// Whether a plain checkpoint is made, without a manifest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// What `config.json` says of matrices in the layout of another tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization_config: Option<serde_json::Value>,
    /// The shards.
    pub shards: Vec<PlannedShard>,
    /// How the passes will encode the tensors that they finish: of a forecast, and of no plan that was saved.
    #[serde(skip)]
    pub(crate) foreseen: BTreeMap<String, Encoding>,
}

/// A pass that is still to be worked out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedPass {
    /// The pass.
    pub pass: Pass,
    /// What it will do and take.
    #[serde(flatten)]
    pub forecast: PassForecast,
}

/// What a pass will do and take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PassForecast {
    /// Of a pruning.
    Prune(llmpress_prune::Forecast),
    /// Of what finishes units: a quantiser, or what makes matrices 2:4.
    Finish(QuantiseForecast),
}

impl PassForecast {
    /// Of a pruning, if it is one.
    pub fn pruning(&self) -> Option<&llmpress_prune::Forecast> {
        match self {
            Self::Prune(forecast) => Some(forecast),
            Self::Finish(_) => None,
        }
    }
}

/// An output shard: the unit of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedShard {
    /// Its number, from 0.
    pub number: usize,
    /// Its file name.
    pub file: String,
    /// Bytes of its tensors.
    pub source_bytes: u64,
    /// Bytes it will probably take.
    pub expected_bytes: u64,
    /// Its units, by name.
    pub units: Vec<PlannedUnit>,
}

/// Tensors that are stored together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedUnit {
    /// The unit's name: the tensor's, or the module's of a DFloat11 unit.
    pub name: String,
    /// What is asked for. Data may make it fall back to raw.
    pub method: Method,
    /// Its tensors, in order.
    pub tensors: Vec<String>,
    /// Bytes of its tensors.
    pub source_bytes: u64,
    /// Bytes it will probably take.
    pub expected_bytes: u64,
}

impl Plan {
    /// Plans a conversion: reads nothing but the open checkpoint's headers. What is quantised already is kept as it is,
    /// unless a rule names it.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe, max_shard_bytes: u64) -> Result<Self> {
        if recipe
            .passes
            .iter()
            .any(|pass| matches!(pass, Pass::Sparsified(_) | Pass::Trained(_) | Pass::Quantised(_)))
            && checkpoint.finished().is_empty()
        {
            return Err(Error::Invalid(
                "a recipe of which a pass has run goes with the units that it finished: convert with --to instead".into(),
            ));
        }
        let stored = |_: &str, tensor: &Tensor| kept_unit(checkpoint, tensor).map(Unit::stored_bytes);
        Self::make(checkpoint, recipe, max_shard_bytes, &stored)
    }

    /// Plans a plain checkpoint of everything that an open one decodes to.
    pub(crate) fn plain(checkpoint: &Checkpoint, max_shard_bytes: u64) -> Result<Self> {
        let plan = Self::make(checkpoint, &Recipe::new(Method::Raw), max_shard_bytes, &|_, _| None)?;
        Ok(Self { plain: true, ..plan })
    }

    /// `kept` says what a tensor takes that is stored under a lossy encoding, and stays so.
    fn make(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        max_shard_bytes: u64,
        kept: &dyn Fn(&str, &Tensor) -> Option<u64>,
    ) -> Result<Self> {
        if max_shard_bytes == 0 {
            return Err(Error::Invalid("the largest shard must have at least one byte".into()));
        }
        if recipe.passes.is_empty() == checkpoint.is_edited() {
            return Err(Error::Invalid(
                "a recipe with passes goes with the checkpoint as they leave it, and no other does".into(),
            ));
        }
        checkpoint.check_units()?;
        let compiled = recipe.compile()?;
        compiled.check_used(checkpoint)?;
        compiled.methods().try_for_each(|method| method.room().check_source(checkpoint))?;
        let mut units = planned_units(checkpoint, recipe, &compiled, kept)?;
        check_bf16(checkpoint, recipe.to, &units)?;
        check_base(checkpoint, &units)?;
        check_stored_names(checkpoint, &units)?;
        let position = |unit: &PlannedUnit| {
            let tensor = unit.tensors.first().and_then(|t| checkpoint.tensors().get(t));
            let position = tensor.and_then(|t| checkpoint.unit_of(t).ok()?.position());
            position.map(|(path, offset)| (path.to_owned(), offset))
        };
        units.sort_by_cached_key(|unit| (position(unit), unit.name.clone()));
        let mut shards: Vec<Vec<PlannedUnit>> = Vec::new();
        let mut filled = 0u64;
        for unit in units {
            if shards.is_empty() || filled.saturating_add(unit.source_bytes) > max_shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += unit.source_bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push(unit);
            }
        }
        let count = shards.len();
        let shards: Vec<PlannedShard> = shards
            .into_iter()
            .enumerate()
            .map(|(i, mut units)| {
                units.sort_by(|a, b| a.name.cmp(&b.name));
                let sum = |f: fn(&PlannedUnit) -> u64| units.iter().map(f).fold(0, u64::saturating_add);
                PlannedShard {
                    number: i,
                    file: format!("model-{:05}-of-{count:05}.safetensors", i + 1),
                    source_bytes: sum(|unit| unit.source_bytes),
                    expected_bytes: sum(|unit| unit.expected_bytes),
                    units,
                }
            })
            .collect();
        let total = |f: fn(&PlannedUnit) -> u64| shards.iter().flat_map(|s| &s.units).map(f).sum();
        Ok(Self {
            plan_version: PLAN_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            source: None,
            base: None,
            recipe: recipe.clone(),
            max_shard_bytes,
            fingerprint: fingerprint(checkpoint, recipe, max_shard_bytes)?,
            source_bytes: total(|u| u.source_bytes),
            expected_bytes: total(|u| u.expected_bytes),
            passes: Vec::new(),
            needs_whole_model: None,
            files: BTreeMap::new(),
            plain: false,
            quantization_config: None,
            shards,
            foreseen: BTreeMap::new(),
        })
    }

    /// Plans what is asked for from headers alone: passes that would have to judge by data are forecast. Also gives the
    /// checkpoint as the passes leave it, or are expected to.
    pub fn forecast(dir: &Path, request: &Request, max_shard_bytes: u64) -> Result<(Self, Checkpoint)> {
        let (plan, view, _) = Self::forecast_with_stand_in(dir, request, max_shard_bytes)?;
        Ok((plan, view))
    }

    /// The same with the recipe in which every pass is settled, as far as headers tell.
    pub(crate) fn forecast_with_stand_in(
        dir: &Path,
        request: &Request,
        max_shard_bytes: u64,
    ) -> Result<(Self, Checkpoint, Recipe)> {
        let chain = crate::chain::forecast(dir, request)?;
        let kept = |name: &str, tensor: &Tensor| {
            let finished = chain.finished.get(name).map(|foreseen| foreseen.bytes);
            finished.or_else(|| kept_unit(&chain.view, tensor).map(Unit::stored_bytes))
        };
        let mut plan = Self::make(&chain.view, &chain.stand_in, max_shard_bytes, &kept)?;
        plan.source = absolute(dir);
        plan.base = request.base.as_deref().and_then(absolute);
        plan.recipe = chain.recipe;
        plan.needs_whole_model = chain.needs_whole_model;
        plan.files = chain.files;
        plan.foreseen =
            chain.finished.into_iter().map(|(name, foreseen)| (name, foreseen.encoding)).collect();
        let passes = chain.passes.into_iter();
        plan.passes = passes.filter_map(|(pass, f)| Some(PlannedPass { pass, forecast: f? })).collect();
        Ok((plan, chain.view, chain.stand_in))
    }

    /// Reads a saved plan.
    ///
    /// # Errors
    /// No plan, or one of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Made {
            plan_version: u32,
            #[serde(default)]
            version: String,
        }
        let wrong = |e| Error::Invalid(format!("not a plan: {e}"));
        let made: Made = serde_json::from_slice(bytes).map_err(wrong)?;
        let (this, version) = (env!("CARGO_PKG_VERSION"), made.version);
        if made.plan_version != PLAN_VERSION || version != this {
            let by = if version.is_empty() {
                "an older llmpress".to_owned()
            } else {
                format!("llmpress {version}")
            };
            return Err(Error::Invalid(format!(
                "the plan was made by {by} and this is {this}, which may store things otherwise: plan again with the version that \
                 carries it out"
            )));
        }
        serde_json::from_slice(bytes).map_err(wrong)
    }

    /// Refuses a plan that is not this one, which was made again from the source.
    pub(crate) fn check_same(&self, saved: &Self) -> Result<()> {
        let same = self.fingerprint == saved.fingerprint
            && self.recipe == saved.recipe
            && self.shards == saved.shards
            && (self.plain, self.source_bytes, self.expected_bytes)
                == (saved.plain, saved.source_bytes, saved.expected_bytes)
            && self.quantization_config == saved.quantization_config;
        if same {
            return Ok(());
        }
        Err(Error::Invalid(
            "the plan does not fit this checkpoint: the source or llmpress changed since; plan again".into(),
        ))
    }

    /// Reads a saved plan and makes it again from the checkpoint; a difference means that the source
    /// changed or that another version made it.
    pub fn from_json(checkpoint: &Checkpoint, bytes: &[u8]) -> Result<Self> {
        let saved = Self::parse(bytes)?;
        Self::new(checkpoint, &saved.recipe, saved.max_shard_bytes)?.check_same(&saved)?;
        Ok(saved)
    }

    /// The recipe of a saved plan.
    pub fn recipe_of_json(bytes: &[u8]) -> Result<Recipe> {
        Ok(Self::parse(bytes)?.recipe)
    }

    /// The one file that is made, where it is no shard of safetensors.
    pub(crate) fn single_file(&self) -> Option<&str> {
        match &self.shards[..] {
            [only] => Some(only.file.as_str()).filter(|file| file.ends_with(crate::gguf::EXTENSION)),
            _ => None,
        }
    }

    /// All units.
    pub fn units(&self) -> impl Iterator<Item = &PlannedUnit> {
        self.shards.iter().flat_map(|s| &s.units)
    }

    /// The threads and pieces that a conversion by this plan would run with.
    pub fn budget(
        &self,
        checkpoint: &Checkpoint,
        jobs: Option<usize>,
        max_memory: Option<u64>,
    ) -> Result<Budget> {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        Budget::new(self.needs(checkpoint), jobs.unwrap_or(available).max(1), max_memory)
    }

    /// What the output will take of a GPU's memory with a sequence of so many tokens. `view` is the checkpoint as the passes
    /// leave it.
    ///
    /// # Errors
    /// It describes no model that runs on a GPU.
    pub fn on_gpu(&self, view: Arc<Checkpoint>, context: usize) -> Result<GpuNeeds> {
        let mut encodings = BTreeMap::new();
        for unit in self.units() {
            for name in &unit.tensors {
                encodings.insert(name.as_str(), self.encoding_on_gpu(&view, unit.method, name)?);
            }
        }
        Ok(GpuNeeds::planned(&self.model(view)?, &encodings, context)?)
    }

    /// How a tensor will lie in a GPU's memory.
    fn encoding_on_gpu(&self, view: &Checkpoint, method: Method, name: &str) -> Result<Encoding> {
        if !matches!(method, Method::Kept | Method::KeptFixed12 | Method::Coded) {
            return Ok(method.room().on_gpu());
        }
        let encoding = match self.foreseen.get(name) {
            Some(foreseen) => foreseen.clone(),
            None => view.unit_of(view.tensor(name)?)?.encoding().clone(),
        };
        // The codes of another tool are taken over where abq holds them.
        let encoding = match encoding {
            Encoding::Foreign(foreign) => foreign.abq().map_or(Encoding::Foreign(foreign), Encoding::Abq),
            other => other,
        };
        let fixed12 = method == Method::KeptFixed12
            || matches!(self.recipe.to, Method::Fixed12 | Method::Sparse24Fixed12);
        Ok(if fixed12 { in_fixed12(encoding) } else { encoding })
    }

    /// Bits in which the output's cache will hold keys and values, and bytes that those of a token will take on a processor; none where
    /// they stay as they are computed. `view` is the checkpoint as the passes leave it.
    ///
    /// # Errors
    /// It describes no model that runs here.
    pub fn cache(&self, view: Arc<Checkpoint>) -> Result<Option<(u8, usize)>> {
        let model = self.model(view)?;
        Ok(model.cache_bits().map(|bits| (bits, model.cache_bytes_per_token())))
    }

    /// The model that comes of it, with the cache that its passes ask for.
    fn model(&self, view: Arc<Checkpoint>) -> Result<Model> {
        // What goes through no pass was opened with the tensors that another tool packed, not with the numbers that they are.
        let packed = view.manifest().is_none() && view.config().is_some_and(|c| c.quantised_by().is_some());
        let view = match packed && !view.is_edited() {
            true => Arc::new(Checkpoint::open_dequantised(view.root())?),
            false => view,
        };
        let mut model = Model::open(view)?;
        if let Some(bits) = self.recipe.passes.iter().find_map(Pass::cache_bits) {
            model.transform(vec![Transform::Quantize { site: QuantizeSite::Cache, bits }])?;
        }
        Ok(model)
    }

    fn needs(&self, checkpoint: &Checkpoint) -> Needs {
        let indivisible = self.units().filter_map(|unit| {
            let tensor = checkpoint.tensors().get(unit.tensors.first()?)?;
            Some(unit.method.room().indivisible_bytes(tensor))
        });
        let handy = self.units().filter_map(|unit| {
            let tensor = checkpoint.tensors().get(unit.tensors.first()?)?;
            Some(unit.method.room().handy_bytes(tensor))
        });
        let base = checkpoint.stored_by().and_then(|base| base.checkpoint());
        let is_compressed = |c: &Checkpoint| c.units().values().any(|unit| unit.encoding().name() != "raw");
        Needs {
            indivisible: indivisible.max().unwrap_or(0),
            handy: handy.max().unwrap_or(0),
            largest_unit: self.units().map(|u| u.source_bytes).max().unwrap_or(0),
            tensors: (checkpoint.tensors().len() + base.map_or(0, |base| base.tensors().len())) as u64,
            compressed_source: is_compressed(checkpoint) || base.is_some_and(is_compressed),
        }
    }
}

/// A path that holds wherever it is read.
fn absolute(dir: &Path) -> Option<String> {
    dir.canonicalize().ok()?.into_os_string().into_string().ok()
}

fn planned_units(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    compiled: &Compiled,
    kept: &dyn Fn(&str, &Tensor) -> Option<u64>,
) -> Result<Vec<PlannedUnit>> {
    let mut units = Vec::new();
    let mut grouped: BTreeSet<&str> = BTreeSet::new();
    for (name, tensor) in checkpoint.tensors().iter().filter(|(name, _)| !compiled.method(name).1) {
        let Some(stored) = kept(name, tensor) else { continue };
        grouped.insert(name);
        let method = match compiled.method(name).0 {
            _ if recipe.entropy_code => Method::Coded,
            Method::Fixed12 | Method::Sparse24Fixed12 if plain_values(checkpoint, tensor).is_some() => {
                Method::KeptFixed12
            }
            _ => Method::Kept,
        };
        units.push(PlannedUnit {
            name: name.clone(),
            method,
            tensors: vec![name.clone()],
            source_bytes: tensor.bytes,
            expected_bytes: method.room().expected_bytes(Some(tensor), stored),
        });
    }
    if recipe.entropy_code && !units.iter().any(|unit| may_have_codes(checkpoint, &unit.name)) {
        return Err(Error::Invalid(format!(
            "{}: nothing of it is or will be quantised, and entropy coding (--entropy-code) is for codes: planes, fixed12 and \
             dfloat11 are for weights",
            checkpoint.root().display()
        )));
    }
    // What a pass made 2:4 stays so, whatever else is asked for: the method is then of the values that are kept. What is stored so stays so for
    // fixed12, to which every zero would be an escape.
    for (name, tensor) in checkpoint.tensors() {
        if grouped.contains(name.as_str()) || !is_sparse(checkpoint, tensor) {
            continue;
        }
        let (asked, by_rule) = compiled.method(name);
        let is_made = checkpoint.finished().contains_key(&tensor.unit);
        if by_rule || !is_made && asked != Method::Fixed12 {
            continue;
        }
        grouped.insert(name);
        let method = match asked {
            Method::Fixed12 | Method::Sparse24Fixed12 => Method::Sparse24Fixed12,
            _ => Method::Sparse24,
        };
        units.push(PlannedUnit {
            name: name.clone(),
            method,
            tensors: vec![name.clone()],
            source_bytes: tensor.bytes,
            expected_bytes: method.room().expected_bytes(Some(tensor), tensor.bytes),
        });
    }
    let kept = grouped.clone();
    for method in compiled.methods() {
        let wanted = |name: &str| compiled.method(name).0 == method && !kept.contains(name);
        let asked = Asked {
            checkpoint,
            wanted: &wanted,
            patterns: compiled.patterns.as_ref(),
            tied_embedding: recipe.tied_embedding,
        };
        for group in method.room().groups(&asked)? {
            let mut names = Vec::new();
            let mut bytes = 0u64;
            for name in group.tensors() {
                let Some((name, tensor)) = checkpoint.tensors().get_key_value(&name) else {
                    return Err(missing_tensor(checkpoint, &group, &name));
                };
                grouped.insert(name);
                names.push(name.clone());
                bytes = bytes.saturating_add(tensor.bytes);
            }
            let expected_bytes = method.room().expected_bytes(None, bytes);
            units.push(PlannedUnit {
                name: group.unit,
                method,
                tensors: names,
                source_bytes: bytes,
                expected_bytes,
            });
        }
    }
    for (name, tensor) in checkpoint.tensors() {
        if grouped.contains(name.as_str()) {
            continue;
        }
        let (asked, by_rule) = compiled.method(name);
        if by_rule && asked.room().bf16_only() && tensor.dtype != Dtype::BF16 {
            return Err(Error::Invalid(format!(
                "tensor {name} is {}, but {} holds BF16 only: give it `planes` or `raw`",
                tensor.dtype.name(),
                asked.name()
            )));
        }
        let by_base = asked == Method::Archive && is_in_base(checkpoint, name, tensor);
        let method = if by_base { Method::Delta } else { Method::alone(asked, tensor) };
        units.push(PlannedUnit {
            name: name.clone(),
            method,
            tensors: vec![name.clone()],
            source_bytes: tensor.bytes,
            expected_bytes: method.room().expected_bytes(Some(tensor), tensor.bytes),
        });
    }
    Ok(units)
}

/// Whether a tensor that is kept has codes that can go through an entropy coder, or will have.
fn may_have_codes(checkpoint: &Checkpoint, tensor: &str) -> bool {
    let unit = checkpoint.tensors().get(tensor).and_then(|tensor| checkpoint.units().get(&tensor.unit));
    let dense = |encoding: &Encoding| matches!(encoding, Encoding::Lowrank(l) if l.base == Base::Raw);
    !unit.is_some_and(|unit| dense(unit.encoding()))
}

/// Whether a tensor is stored as 2:4 whose values are not quantised.
fn is_sparse(checkpoint: &Checkpoint, tensor: &Tensor) -> bool {
    tensor.is_stored()
        && checkpoint.units().get(&tensor.unit).is_some_and(|u| matches!(u.encoding(), Encoding::Sparse24(_)))
}

/// Whether the base that a checkpoint is to be stored by has a tensor of the same name, dtype and shape.
fn is_in_base(checkpoint: &Checkpoint, name: &str, tensor: &Tensor) -> bool {
    let base = checkpoint.stored_by().and_then(|base| base.checkpoint());
    let found = base.and_then(|base| base.tensor(name).ok());
    found.is_some_and(|found| found.dtype == tensor.dtype && found.shape == tensor.shape)
}

/// A base that has nothing to do with the checkpoint is a mistake worth an error before any work.
fn check_base(checkpoint: &Checkpoint, units: &[PlannedUnit]) -> Result<()> {
    let Some(base) = checkpoint.stored_by().and_then(|base| base.checkpoint()) else { return Ok(()) };
    if units.iter().any(|unit| unit.method == Method::Delta) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "--base {}: has no tensor with the name, dtype and shape of one of {} that is to be archived: give the checkpoint that it \
         was trained from, or leave --base out",
        base.root().display(),
        checkpoint.root().display()
    )))
}

/// A method for BF16 that finds none of it is a mistake worth an error before any work.
fn check_bf16(checkpoint: &Checkpoint, to: Method, units: &[PlannedUnit]) -> Result<()> {
    // What is left beside quantised tensors need not be of any kind.
    let finished =
        [Method::Kept, Method::KeptFixed12, Method::Coded, Method::Sparse24, Method::Sparse24Fixed12];
    let stored = |u: &PlannedUnit| u.method == to || finished.contains(&u.method);
    if !to.room().bf16_only() || units.iter().any(stored) {
        return Ok(());
    }
    let mut dtypes: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors() {
        dtypes.entry(tensor.dtype.name()).or_insert((0, name)).0 += 1;
    }
    let found: Vec<String> =
        dtypes.iter().map(|(dtype, (n, first))| format!("{n} {dtype} (such as {first})")).collect();
    let found = if found.is_empty() { "no tensors at all".to_owned() } else { found.join(", ") };
    if let Some(method) = checkpoint.config().and_then(|c| c.quantised_by()) {
        return Err(Error::Invalid(format!(
            "{}: {} holds BF16 matrices, and these were quantised by {method} (quantization_config.quant_method): this \
             checkpoint has {found}; use --to planes, which holds any dtype, or restore it first (which makes numbers of FP8, NVFP4 and MXFP4), or dequantise it with the tool that made it, \
             or convert the original checkpoint",
            checkpoint.root().display(),
            to.name()
        )));
    }
    let what = to.room().nothing_suits(&found, dtypes.contains_key(Dtype::BF16.name()));
    Err(Error::Invalid(format!("{}: {what}", checkpoint.root().display())))
}

/// No two units may store a component under the same name, whether encoded or fallen back to raw.
fn check_stored_names(checkpoint: &Checkpoint, units: &[PlannedUnit]) -> Result<()> {
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for unit in units {
        let encoded = unit.method.room().components().iter().map(|c| format!("{}.{c}", unit.name));
        for name in encoded.chain(unit.tensors.iter().cloned()) {
            if name == METADATA_KEY {
                return Err(Error::Invalid(format!(
                    "{}: a tensor is called {name}, a name that safetensors keeps for itself: rename it",
                    checkpoint.root().display()
                )));
            }
            if let Some(other) = owners.insert(name.clone(), &unit.name) {
                return Err(Error::Invalid(format!(
                    "{}: {other} and {} would both be stored as {name}: keep one of them raw by a rule, or rename it",
                    checkpoint.root().display(),
                    unit.name
                )));
            }
        }
    }
    Ok(())
}
