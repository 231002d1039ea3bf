//! The plan: what becomes of every tensor, from headers alone.
//!
//! ```text
//! tensors -> units (one encoding each) -> shards (bounded by their source bytes, in source order)
//! ```

use std::collections::{BTreeMap, BTreeSet};

use llmpress_entropy::fixed12::TILE_ROWS;
use llmpress_entropy::planes::CHUNK_ELEMENTS;
use llmpress_formats::encoding::{dfloat11, fixed12, planes};
use llmpress_formats::{Checkpoint, Dtype, METADATA_KEY, Tensor, Traits, UnitPattern, derive_units};
use serde::{Deserialize, Serialize};

use crate::budget::{Budget, Needs};
use crate::fingerprint::fingerprint;
use crate::recipe::Compiled;
use crate::{Error, Method, Recipe, Result};

/// Tensors smaller than this are kept raw by `planes`: their frames and names would cost more.
const MIN_PLANES_BYTES: u64 = 1024;
/// Version of the plan's JSON.
const PLAN_VERSION: u32 = 1;

/// What is going to happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of this description.
    pub plan_version: u32,
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
    /// Whether a plain checkpoint is made, without a manifest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// The shards.
    pub shards: Vec<PlannedShard>,
}

/// An output shard: the unit of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedShard {
    /// Its file name.
    pub file: String,
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
    /// Plans a conversion: reads nothing but the open checkpoint's headers.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe, max_shard_bytes: u64) -> Result<Self> {
        if max_shard_bytes == 0 {
            return Err(Error::Invalid("the largest shard must have at least one byte".into()));
        }
        if recipe.prune.is_some() != checkpoint.is_edited() {
            return Err(Error::Invalid(
                "a recipe that prunes goes with the checkpoint as its edit shows it, and no other does"
                    .into(),
            ));
        }
        let compiled = recipe.compile()?;
        let names = checkpoint.tensors().keys().map(String::as_str);
        if let Some(rule) = compiled.unused_rule(names) {
            return Err(Error::Invalid(format!("rule {rule:?} matches no tensor of this checkpoint")));
        }
        let mut units = planned_units(checkpoint, recipe, &compiled)?;
        check_bf16(checkpoint, recipe.to, &units)?;
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
                PlannedShard { file: format!("model-{:05}-of-{count:05}.safetensors", i + 1), units }
            })
            .collect();
        let total = |f: fn(&PlannedUnit) -> u64| shards.iter().flat_map(|s| &s.units).map(f).sum();
        Ok(Self {
            plan_version: PLAN_VERSION,
            recipe: recipe.clone(),
            max_shard_bytes,
            fingerprint: fingerprint(checkpoint, recipe, max_shard_bytes)?,
            source_bytes: total(|u| u.source_bytes),
            expected_bytes: total(|u| u.expected_bytes),
            plain: false,
            shards,
        })
    }

    /// Reads a saved plan and makes it again from the checkpoint; a difference means that the source
    /// changed or that another version made it.
    pub fn from_json(checkpoint: &Checkpoint, bytes: &[u8]) -> Result<Self> {
        let saved: Self =
            serde_json::from_slice(bytes).map_err(|e| Error::Invalid(format!("not a plan: {e}")))?;
        let plan = Self::new(checkpoint, &saved.recipe, saved.max_shard_bytes)?;
        if plan != saved {
            return Err(Error::Invalid(
                "the plan does not fit this checkpoint: the source or llmpress changed since; plan again"
                    .into(),
            ));
        }
        Ok(plan)
    }

    /// The recipe of a saved plan.
    pub fn recipe_of_json(bytes: &[u8]) -> Result<Recipe> {
        let saved: Self =
            serde_json::from_slice(bytes).map_err(|e| Error::Invalid(format!("not a plan: {e}")))?;
        Ok(saved.recipe)
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

    fn needs(&self, checkpoint: &Checkpoint) -> Needs {
        let indivisible = self.units().filter_map(|unit| {
            let tensor = checkpoint.tensors().get(unit.tensors.first()?)?;
            match unit.method {
                Method::Fixed12 => Some(tensor.shape.last()?.saturating_mul(2 * TILE_ROWS as u64)),
                Method::Planes => Some((CHUNK_ELEMENTS * planes::split(tensor.dtype).width) as u64),
                Method::Raw | Method::Dfloat11 => None,
            }
        });
        Needs {
            indivisible: indivisible.max().unwrap_or(0),
            largest_unit: self.units().map(|u| u.source_bytes).max().unwrap_or(0),
            tensors: checkpoint.tensors().len() as u64,
            compressed_source: checkpoint.units().values().any(|u| u.encoding().name() != "raw"),
        }
    }
}

fn planned_units(checkpoint: &Checkpoint, recipe: &Recipe, compiled: &Compiled) -> Result<Vec<PlannedUnit>> {
    let mut units = Vec::new();
    let mut grouped: BTreeSet<&str> = BTreeSet::new();
    if compiled.uses(Method::Dfloat11) {
        for pattern in dfloat11_units(checkpoint, recipe, compiled)? {
            let mut names = Vec::new();
            let mut bytes = 0;
            for name in pattern.tensors() {
                let Some((name, tensor)) = checkpoint.tensors().get_key_value(&name) else {
                    return Err(missing_tensor(checkpoint, &pattern, &name));
                };
                grouped.insert(name);
                names.push(name.clone());
                bytes += tensor.bytes;
            }
            units.push(PlannedUnit {
                name: pattern.unit,
                method: Method::Dfloat11,
                tensors: names,
                source_bytes: bytes,
                expected_bytes: expected(Method::Dfloat11, bytes),
            });
        }
    }
    for (name, tensor) in checkpoint.tensors() {
        if grouped.contains(name.as_str()) {
            continue;
        }
        let (asked, by_rule) = compiled.method(name);
        if by_rule && matches!(asked, Method::Dfloat11 | Method::Fixed12) && tensor.dtype != Dtype::BF16 {
            return Err(Error::Invalid(format!(
                "tensor {name} is {}, but {} holds BF16 only: give it `planes` or `raw`",
                tensor.dtype.name(),
                asked.name()
            )));
        }
        let method = single_method(asked, tensor);
        let expected = match (method, fixed12::grid(&tensor.shape)) {
            (Method::Fixed12, Some(grid)) => {
                grid.sign_mantissa_bytes() + grid.codes_bytes() + grid.escape_offsets_bytes()
            }
            _ => expected(method, tensor.bytes),
        };
        units.push(PlannedUnit {
            name: name.clone(),
            method,
            tensors: vec![name.clone()],
            source_bytes: tensor.bytes,
            expected_bytes: expected,
        });
    }
    Ok(units)
}

/// The method a tensor outside DFloat11 units really gets.
fn single_method(asked: Method, tensor: &Tensor) -> Method {
    let planes = if tensor.bytes >= MIN_PLANES_BYTES { Method::Planes } else { Method::Raw };
    match asked {
        // The published format keeps everything else plain.
        Method::Raw | Method::Dfloat11 => Method::Raw,
        Method::Planes => planes,
        Method::Fixed12 if tensor.dtype != Dtype::BF16 => planes,
        Method::Fixed12 => match fixed12::grid(&tensor.shape) {
            Some(g)
                if g.sign_mantissa_bytes() + g.codes_bytes() + g.escape_offsets_bytes() < tensor.bytes =>
            {
                Method::Fixed12
            }
            _ => Method::Raw,
        },
    }
}

fn dfloat11_units(checkpoint: &Checkpoint, recipe: &Recipe, compiled: &Compiled) -> Result<Vec<UnitPattern>> {
    let asked = |name: &str| compiled.method(name).0 == Method::Dfloat11;
    if let Some(patterns) = &compiled.patterns {
        let (mut units, unused) = patterns.units(checkpoint.tensors().keys().map(String::as_str));
        if let Some(pattern) = unused.first() {
            return Err(Error::Invalid(format!("pattern {pattern:?} matches no module of this checkpoint")));
        }
        for unit in &mut units {
            for name in unit.tensors() {
                match checkpoint.tensors().get(&name) {
                    None => return Err(missing_tensor(checkpoint, unit, &name)),
                    Some(t) if t.dtype != Dtype::BF16 => {
                        return Err(Error::Invalid(format!(
                            "tensor {name} of unit {} is {}; DFloat11 holds BF16 only: take it out of the pattern file",
                            unit.unit,
                            t.dtype.name()
                        )));
                    }
                    Some(_) => {}
                }
            }
            let name = unit.unit.clone();
            unit.paths.retain(|path| asked(&format!("{name}.{path}.weight")));
        }
        let direct = |u: &UnitPattern| asked(&format!("{}.weight", u.unit));
        units.retain(|u| {
            !u.paths.is_empty()
                || direct(u) && checkpoint.tensors().contains_key(&format!("{}.weight", u.unit))
        });
        let mut seen = BTreeSet::new();
        if let Some(name) = units.iter().flat_map(UnitPattern::tensors).find(|n| !seen.insert(n.clone())) {
            return Err(Error::Invalid(format!("the pattern file puts tensor {name} into two units")));
        }
        return Ok(units);
    }
    let config = checkpoint.config();
    let traits = Traits {
        model_type: config.and_then(|c| c.model_type()),
        tied: !checkpoint.tied().is_empty() || config.and_then(|c| c.tie_word_embeddings()) == Some(true),
        tied_embedding: recipe.tied_embedding,
    };
    let linears = checkpoint
        .tensors()
        .iter()
        .filter(|(name, t)| t.dtype == Dtype::BF16 && t.shape.len() == 2 && t.bytes > 0 && asked(name))
        .map(|(name, _)| name.as_str());
    Ok(derive_units(traits, linears))
}

fn missing_tensor(checkpoint: &Checkpoint, unit: &UnitPattern, name: &str) -> Error {
    let near = checkpoint.tensor(name).err().map(|e| e.to_string()).unwrap_or_default();
    Error::Invalid(format!("unit {} needs tensor {name}: {near}", unit.unit))
}

/// A method for BF16 that finds none of it is a mistake worth an error before any work.
fn check_bf16(checkpoint: &Checkpoint, to: Method, units: &[PlannedUnit]) -> Result<()> {
    if !matches!(to, Method::Dfloat11 | Method::Fixed12) || units.iter().any(|u| u.method == to) {
        return Ok(());
    }
    let mut dtypes: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors() {
        dtypes.entry(tensor.dtype.name()).or_insert((0, name)).0 += 1;
    }
    let found: Vec<String> =
        dtypes.iter().map(|(dtype, (n, first))| format!("{n} {dtype} (such as {first})")).collect();
    let found = if found.is_empty() { "no tensors at all".to_owned() } else { found.join(", ") };
    let root = checkpoint.root().display();
    Err(Error::Invalid(match (to, dtypes.contains_key("BF16")) {
        (Method::Dfloat11, true) => format!(
            "{root}: no BF16 linears in repeated blocks were found among {found}; name the units with --pattern-file, or use --to planes"
        ),
        _ => format!(
            "{root}: {} holds BF16 matrices, and this checkpoint has {found}; use --to planes",
            to.name()
        ),
    }))
}

/// No two units may store a component under the same name, whether encoded or fallen back to raw.
fn check_stored_names(checkpoint: &Checkpoint, units: &[PlannedUnit]) -> Result<()> {
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for unit in units {
        let components: &[&str] = match unit.method {
            Method::Raw => &[],
            Method::Planes => &[planes::PLANES, planes::LENGTHS],
            Method::Dfloat11 => &dfloat11::COMPONENTS,
            Method::Fixed12 => &fixed12::COMPONENTS,
        };
        let encoded = components.iter().map(|c| format!("{}.{c}", unit.name));
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

/// What trained weights usually come to.
fn expected(method: Method, bytes: u64) -> u64 {
    let percent = match method {
        Method::Raw => 100,
        Method::Planes => 70,
        Method::Dfloat11 => 68,
        Method::Fixed12 => 76,
    };
    (u128::from(bytes) * percent / 100) as u64
}
