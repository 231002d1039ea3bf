//! A recipe: which method each tensor is to get.
//!
//! ```text
//! to = "dfloat11"                 the method for everything
//! [[rule]]                        exceptions by tensor name, the last that matches counts
//! tensors = 'lm_head\.weight'
//! to = "raw"
//! [prune]                         sub-layers that go first, by layer
//! attention = [20, 21, 22]
//! ```

use std::path::Path;

use llmpress_formats::{PatternDict, Removal};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Method, Result};

/// An exception for some tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A regular expression that must match the whole name of a tensor.
    pub tensors: String,
    /// The method for them.
    pub to: Method,
}

/// What is to be made of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The method for every tensor that no rule names.
    pub to: Method,
    /// Exceptions; the last that matches counts.
    #[serde(rename = "rule", default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// DFloat11 only: the official `pattern_dict` to use instead of the derived one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern_dict: Option<serde_json::Value>,
    /// DFloat11 only: compress an embedding that is also the output head. The official runtime cannot
    /// run such a checkpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tied_embedding: bool,
    /// Sub-layers that are removed first, by the numbers of the source's layers. Plans are made of, and carried out on,
    /// the checkpoint as [`Removal::edit`] shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Removal>,
}

impl Recipe {
    /// One method for everything.
    pub fn new(to: Method) -> Self {
        Self { to, rules: Vec::new(), pattern_dict: None, tied_embedding: false, prune: None }
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
    rules: Vec<(Regex, Method)>,
    pub(crate) patterns: Option<PatternDict>,
}

impl Compiled {
    /// The method for a tensor, and whether a rule asked for it by name.
    pub(crate) fn method(&self, tensor: &str) -> (Method, bool) {
        match self.rules.iter().rev().find(|(regex, _)| regex.is_match(tensor)) {
            Some((_, method)) => (*method, true),
            None => (self.to, false),
        }
    }

    /// The methods that it names, each once.
    pub(crate) fn methods(&self) -> impl Iterator<Item = Method> {
        Method::ALL.iter().copied().filter(|m| self.to == *m || self.rules.iter().any(|(_, rule)| rule == m))
    }

    /// Rules that no tensor matches: surely a mistake.
    pub(crate) fn unused_rule<'a>(&self, tensors: impl Iterator<Item = &'a str> + Clone) -> Option<&str> {
        let unused = self.rules.iter().find(|(regex, _)| !tensors.clone().any(|t| regex.is_match(t)));
        unused.map(|(regex, _)| regex.as_str().trim_start_matches("^(?:").trim_end_matches(")$"))
    }
}
