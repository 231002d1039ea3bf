//! A recipe: what happens to a checkpoint, and then which method each tensor is to get.
//!
//! ```text
//! passes = ["drop:attn=8", "gptq:w4"]   what happens first, pass after pass
//! to = "dfloat11"                       the method for everything
//! [[rule]]                              exceptions by tensor name, the last that matches counts
//! tensors = 'lm_head\.weight'
//! to = "raw"                            or a quantiser, where one of the passes is
//! ```

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use llmpress_formats::{Checkpoint, PatternDict, Removal};
use llmpress_sparsify::Partly;
use regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::pass::Pass;
use crate::{Error, Method, Quantiser, Result};

/// An exception for some tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A regular expression that must match the whole name of a tensor.
    pub tensors: String,
    /// What becomes of them.
    pub to: Target,
}

/// What a rule asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A method. No pass quantises these tensors, and what is quantised already is decoded.
    Method(Method),
    /// How the quantising pass of the recipe treats them.
    Quantise(Quantiser),
}

impl Target {
    /// The method, if it is one.
    pub fn method(self) -> Option<Method> {
        match self {
            Self::Method(method) => Some(method),
            Self::Quantise(_) => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Method(method) => f.write_str(method.name()),
            Self::Quantise(quantiser) => quantiser.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match Quantiser::names(text) {
            true => {
                let quantiser: Quantiser = text.parse()?;
                if quantiser.is_of_model() {
                    return Err(Error::Invalid(format!(
                        "{text:?}: rotate, smooth, qkv, kv and a mean of bits are of the whole model: say them in the pass and not in a rule"
                    )));
                }
                Ok(Self::Quantise(quantiser))
            }
            false => text.parse().map(Self::Method),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What is to be made of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Recipe {
    /// What happens first, in order. A pass changes which tensors there are; plans are made of, and carried out on, the
    /// checkpoint as [`view`](crate::view()) shows it after all of them.
    pub passes: Vec<Pass>,
    /// The method for every tensor that no rule names.
    pub to: Method,
    /// Exceptions; the last that matches counts.
    pub rules: Vec<Rule>,
    /// DFloat11 only: the official `pattern_dict` to use instead of the derived one.
    pub pattern_dict: Option<serde_json::Value>,
    /// DFloat11 only: compress an embedding that is also the output head. The official runtime cannot
    /// run such a checkpoint.
    pub tied_embedding: bool,
    /// Codes of quantised matrices go through an entropy coder where that takes less room.
    pub entropy_code: bool,
}

/// A recipe as it is written down. A single removal of sub-layers is `prune`, which version 1.0 of the format knows.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    to: Method,
    #[serde(rename = "rule", default, skip_serializing_if = "Vec::is_empty")]
    rules: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pattern_dict: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    tied_embedding: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    entropy_code: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prune: Option<Removal>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    passes: Vec<Pass>,
}

impl TryFrom<Written> for Recipe {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written { to, rules, pattern_dict, tied_embedding, entropy_code, prune, passes } = written;
        let passes = match (prune, passes) {
            (None, passes) => passes,
            (Some(removal), passes) if passes.is_empty() => vec![Pass::Remove(removal)],
            (Some(_), _) => return Err("has both `prune` and `passes`: make it one of the passes".to_owned()),
        };
        Ok(Self { passes, to, rules, pattern_dict, tied_embedding, entropy_code })
    }
}

impl From<Recipe> for Written {
    fn from(recipe: Recipe) -> Self {
        let Recipe { passes, to, rules, pattern_dict, tied_embedding, entropy_code } = recipe;
        let (prune, passes) = match <[Pass; 1]>::try_from(passes) {
            Ok([Pass::Remove(removal)]) => (Some(removal), Vec::new()),
            Ok(other) => (None, other.to_vec()),
            Err(passes) => (None, passes),
        };
        Self { to, rules, pattern_dict, tied_embedding, entropy_code, prune, passes }
    }
}

impl Recipe {
    /// The quantisers that passes and rules still ask for.
    pub(crate) fn quantisers(&self) -> impl Iterator<Item = Quantiser> {
        let of_pass = self.passes.iter().filter_map(|pass| match pass {
            Pass::Quantise(quantiser) => Some(*quantiser),
            Pass::Prune(_)
            | Pass::Remove(_)
            | Pass::Sparsify(_)
            | Pass::Sparsified(_)
            | Pass::Train(_)
            | Pass::Trained(_)
            | Pass::Quantised(_) => None,
        });
        let of_rule = self.rules.iter().filter_map(|rule| match rule.to {
            Target::Quantise(quantiser) => Some(quantiser),
            Target::Method(_) => None,
        });
        of_pass.chain(of_rule)
    }

    /// One method for everything.
    pub fn new(to: Method) -> Self {
        Self {
            passes: Vec::new(),
            to,
            rules: Vec::new(),
            pattern_dict: None,
            tied_embedding: false,
            entropy_code: false,
        }
    }

    /// Opens the source as this recipe takes it. Whoever only stores tensors takes them as they lie there; passes, which work on weights,
    /// take matrices that another tool quantised as the numbers that they stand for. Without passes a method that takes numbers gets codes of
    /// integers as such: small floats would only become larger.
    ///
    /// # Errors
    /// As for [`Checkpoint::open_dequantised`].
    pub fn open(&self, dir: &Path) -> Result<Checkpoint> {
        let methods = || self.rules.iter().filter_map(|rule| rule.to.method()).chain([self.to]);
        Ok(match (self.passes.is_empty(), methods().any(|m| m.room().takes_numbers())) {
            (false, _) => Checkpoint::open_dequantised(dir)?,
            (true, true) => Checkpoint::open_codes(dir)?,
            (true, false) => Checkpoint::open(dir)?,
        })
    }

    /// Reads the short form: passes and at most one method, which is the last, joined by `+`.
    pub fn from_short(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('+').collect();
        let (passes, to) = match parts.split_last() {
            Some((last, before)) if !Pass::names(last) => (before, last.parse()?),
            _ => (&parts[..], Method::Raw),
        };
        let passes = passes.iter().map(|part| match part.parse::<Method>() {
            Ok(_) => Err(Error::Invalid(format!(
                "{text:?}: {part} stores tensors and comes last: what changes them comes before it"
            ))),
            Err(_) => part.parse(),
        });
        Ok(Self { passes: passes.collect::<Result<_>>()?, ..Self::new(to) })
    }

    /// Reads a TOML recipe.
    pub fn from_toml(path: &Path, text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
            Error::Invalid(format!("{}: line {}: {}", path.display(), line + 1, e.message()))
        })
    }

    /// The recipe, checked and ready to be asked.
    pub(crate) fn compile(&self) -> Result<Compiled> {
        let methods = || self.rules.iter().filter_map(|rule| rule.to.method()).chain([self.to]);
        if let Some(method) = methods().find(|method| !Method::ALL.contains(method)) {
            return Err(Error::Invalid(format!(
                "`{}` is not for recipes: what is quantised is kept as it is unless a rule names it",
                method.name()
            )));
        }
        let quantising =
            self.passes.iter().filter(|p| matches!(p, Pass::Quantise(_) | Pass::Quantised(_))).count();
        if quantising > 1 {
            return Err(Error::Invalid(
                "two passes quantise: give one of them, and other widths to some tensors by rules".into(),
            ));
        }
        let is_sparsifying = |pass: &Pass| matches!(pass, Pass::Sparsify(_) | Pass::Sparsified(_));
        let sparsifying: Vec<usize> =
            (0..self.passes.len()).filter(|&i| self.passes.get(i).is_some_and(is_sparsifying)).collect();
        if sparsifying.len() > 1 {
            return Err(Error::Invalid("two passes make matrices 2:4: give one of them".into()));
        }
        for (at, pass) in self.passes.iter().enumerate() {
            let before = at.checked_sub(1).and_then(|before| self.passes.get(before));
            if matches!(pass, Pass::Train(_) | Pass::Trained(_)) && !before.is_some_and(is_sparsifying) {
                return Err(Error::Invalid(format!(
                    "{pass} trains what the pass right before it made 2:4: write sparse24:sparsegpt,reconstruct+{pass}, or another \
                     start: sparse24:magnitude, sparse24:wanda"
                )));
            }
        }
        let quantises = |pass: &Pass| matches!(pass, Pass::Quantise(_) | Pass::Quantised(_));
        let has_sums = |pass: &Pass| match pass {
            Pass::Sparsify(to) => to.slorb,
            Pass::Sparsified(done) => done.to.slorb,
            Pass::Train(to) => to.slorb,
            Pass::Trained(done) => done.to.slorb,
            _ => false,
        };
        let has_codes = self.passes.iter().any(|pass| quantises(pass) || has_sums(pass));
        if self.entropy_code && !sparsifying.is_empty() && !has_codes {
            return Err(Error::Invalid(
                "--entropy-code is for codes, and kept values are not quantised here: put a quantiser after sparse24:..., as \
                 +gptq:w4,g64, or take fixed12 for plain values"
                    .into(),
            ));
        }
        if let (Some(at), Some(&sparse)) = (self.passes.iter().position(quantises), sparsifying.first())
            && at < sparse
        {
            return Err(Error::Invalid(
                "what is quantised cannot be made 2:4: give the quantiser after sparse24:...".into(),
            ));
        }
        // Which matrices the quantiser leaves is settled by name before: nothing may be renamed between.
        let chooses =
            |pass: &Pass| matches!(pass, Pass::Sparsify(how) if matches!(how.partly, Some(Partly::Ratio(_))));
        if let (Some(at), Some(last)) =
            (self.passes.iter().position(chooses), self.passes.iter().position(quantises))
            && self.passes.iter().take(last).skip(at).any(Pass::prunes)
        {
            return Err(Error::Invalid(
                "a ratio counts what the quantiser leaves of each matrix: prune before sparse24:...,ratio and not between the two"
                    .into(),
            ));
        }
        let quantises = |rule: &&Rule| matches!(rule.to, Target::Quantise(_));
        if let Some(rule) = self.rules.iter().find(quantises).filter(|_| quantising == 0) {
            return Err(Error::Invalid(format!(
                "rule {:?} asks for {}, but no pass quantises: add one, such as passes = [\"{}\"]",
                rule.tensors, rule.to, rule.to
            )));
        }
        let rules = self.rules.iter().map(|rule| {
            let regex = regex::RegexBuilder::new(&format!("^(?:{})$", rule.tensors))
                .size_limit(1 << 20)
                .build()
                .map_err(|e| Error::Invalid(format!("rule {:?}: {e}", rule.tensors)))?;
            Ok((regex, rule.to))
        });
        let patterns = self.pattern_dict.as_ref().map(PatternDict::parse).transpose()?;
        let compiled = Compiled { to: self.to, rules: rules.collect::<Result<_>>()?, patterns };
        if self.pattern_dict.is_some() && !compiled.methods().any(|m| m.room().takes_patterns()) {
            return Err(Error::Invalid(
                "a pattern file is for dfloat11, which this recipe does not use".into(),
            ));
        }
        Ok(compiled)
    }
}

/// A recipe with its expressions compiled.
pub(crate) struct Compiled {
    to: Method,
    rules: Vec<(Regex, Target)>,
    pub(crate) patterns: Option<PatternDict>,
}

impl Compiled {
    /// What a rule asks for a tensor, if one matches.
    pub(crate) fn rule(&self, tensor: &str) -> Option<Target> {
        self.rules.iter().rev().find(|(regex, _)| regex.is_match(tensor)).map(|(_, target)| *target)
    }

    /// The method for a tensor, and whether a rule asked for it by name. What a rule has quantised is stored so already.
    pub(crate) fn method(&self, tensor: &str) -> (Method, bool) {
        match self.rule(tensor) {
            Some(Target::Method(method)) => (method, true),
            Some(Target::Quantise(_)) | None => (self.to, false),
        }
    }

    /// The methods that it names, each once.
    pub(crate) fn methods(&self) -> impl Iterator<Item = Method> {
        let of_rules = |m: &Method| self.rules.iter().any(|(_, rule)| *rule == Target::Method(*m));
        Method::ALL.iter().copied().filter(move |m| self.to == *m || of_rules(m))
    }

    /// Refuses a rule that no tensor matches: surely a mistake.
    pub(crate) fn check_used(&self, checkpoint: &Checkpoint) -> Result<()> {
        let mut names = checkpoint.tensors().keys();
        let unused = self.rules.iter().find(|(regex, _)| !names.clone().any(|name| regex.is_match(name)));
        let Some((regex, _)) = unused else { return Ok(()) };
        let rule = regex.as_str().trim_start_matches("^(?:").trim_end_matches(")$");
        let some =
            names.next().map_or(String::new(), |name| format!(", whose tensors are named like {name}"));
        Err(Error::Invalid(format!("rule {rule:?} matches no tensor of this checkpoint{some}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_read_part_by_part() {
        let short = |text: &str| Recipe::from_short(text);
        let of = |text: &str| {
            let recipe = short(text).unwrap();
            let passes: Vec<String> = recipe.passes.iter().map(ToString::to_string).collect();
            (passes.join(" | "), recipe.to)
        };
        assert_eq!(of("dfloat11"), (String::new(), Method::Dfloat11));
        assert_eq!(of("drop:attn=8"), ("drop:attn=8".into(), Method::Raw));
        assert_eq!(
            of("drop:attn=8+drop:mlp=2,portable+finercut:25%+fixed12"),
            (
                "drop:attn=8 | drop:mlp=2,portable | finercut:25%,distance=js,protect=0.4".into(),
                Method::Fixed12
            )
        );
        for (bad, words) in [
            ("", "unknown method"),
            ("zip", "unknown method"),
            ("dfloat11+drop:attn=8", "comes last"),
            ("drop:attn=8+", "unknown method"),
            ("drop:attn=8+fixed12+raw", "comes last"),
            ("drop:attn=8+zip+raw", "zip"),
            ("drop:heads=8+raw", "no such target"),
        ] {
            let error = short(bad).unwrap_err().to_string();
            assert!(error.contains(words), "{bad}: {error}");
        }
    }

    #[test]
    fn recipes_are_written_as_they_are_read() {
        let toml = |text: &str| Recipe::from_toml(Path::new("r.toml"), text);
        let removal = "{ attention = [6, 7], mlp = [7] }";
        let one = toml("to = \"fixed12\"\n[prune]\nattention = [6, 7]\nmlp = [7]\n").unwrap();
        let same = toml(&format!("to = \"fixed12\"\npasses = [{{ prune = {removal} }}]\n")).unwrap();
        assert_eq!(one, same);
        // As version 1.0 wrote it.
        let written = serde_json::to_string(&one).unwrap();
        assert_eq!(written, r#"{"to":"fixed12","prune":{"attention":[6,7],"mlp":[7]}}"#);
        let two =
            toml(&format!("passes = [\"drop:attn=2\", {{ prune = {removal} }}]\nto = \"raw\"\n")).unwrap();
        let written = serde_json::to_string(&two).unwrap();
        assert!(written.contains(r#""passes":["drop:attn=2",{"prune":{"#), "{written}");
        assert_eq!(serde_json::from_str::<Recipe>(&written).unwrap(), two);
        for (bad, words) in [
            ("to = \"raw\"\npasses = [\"drop:heads=2\"]\n", "no such target"),
            ("to = \"raw\"\npasses = [\"raw\"]\n", "starts with neither"),
            ("to = \"raw\"\npasses = [\"rtn:w9\"]\n", "weights of 9 bits"),
            ("to = \"raw\"\n[[rule]]\ntensors = \"a\"\nto = \"rtn:w4,g33\"\n", "a multiple of 32"),
            ("to = \"raw\"\n[[rule]]\ntensors = \"a\"\nto = \"rtn:w4,rotate\"\n", "of the whole model"),
            ("to = \"raw\"\npasses = [\"drop:attn=2\"]\n[prune]\nmlp = [1]\n", "both"),
        ] {
            let error = toml(bad).unwrap_err().to_string();
            assert!(error.contains("r.toml") && error.contains(words), "{error}");
        }
    }
}
