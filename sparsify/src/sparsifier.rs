//! How a matrix is to be made sparse, as it is written.
//!
//! ```text
//! sparse24 : sparsegpt [, permute] [, reconstruct [, steps=150] [, seed=0]] [, slorb] [, dense=10%]
//!            magnitude, wanda                                             [, ratio=0.6]
//! ```

use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::partly::{Partly, Share};

/// What the text begins with.
const NAME: &str = "sparse24";

/// How masks are found, each way dearer and better than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The greatest weights. Goes by no text.
    Magnitude,
    /// The greatest products of weights and the norms of what they multiply. Needs a text.
    Wanda,
    /// Second-order scores; the other columns make up for what is dropped. Needs a text.
    SparseGpt,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Magnitude, Self::Wanda, Self::SparseGpt];

    /// Its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How sub-layers are reconstructed from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reconstruct {
    /// Steps, a window each; [`Reconstruct::STEPS`] where that is not said.
    pub steps: Option<u32>,
    /// What draws windows.
    pub seed: u64,
}

impl Reconstruct {
    /// Steps where nothing is said of them.
    pub const STEPS: u32 = 150;
    /// The most steps.
    pub const MOST_STEPS: u32 = 100_000;
    /// The fewest windows: of so many one is held back, which no step sees, to judge by.
    pub const LEAST_WINDOWS: usize = llmpress_learn::HELD_BACK;

    /// Steps that it takes.
    pub fn steps(&self) -> u32 {
        self.steps.unwrap_or(Self::STEPS)
    }

    /// Refuses a text of so many windows where it is too short to learn from.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check_windows(windows: usize) -> Result<()> {
        if windows >= Self::LEAST_WINDOWS {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "reconstruction takes {} calibration windows at least, of which one is held back to judge by, and there are \
             {windows}: raise --calib-windows, with a shorter --calib-window where the text has no more, or leave `reconstruct` \
             out",
            Self::LEAST_WINDOWS
        )))
    }
}

/// How a matrix is to be made sparse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sparsifier {
    /// How masks are found.
    pub rule: Rule,
    /// Whether channels are put in another order before, where it is free.
    pub permute: bool,
    /// Whether its sub-layer is reconstructed, masks kept.
    pub reconstruct: Option<Reconstruct>,
    /// Whether sums of inputs, 16 columns each, have weights of their own beside.
    pub slorb: bool,
    /// Whether some of all matrices stay dense, and which.
    pub partly: Option<Partly>,
}

impl Sparsifier {
    /// Of a rule alone.
    pub fn new(rule: Rule) -> Self {
        Self { rule, permute: false, reconstruct: None, slorb: false, partly: None }
    }

    /// Whether it goes by a text.
    pub fn needs_text(&self) -> bool {
        self.finds_by_text() || self.partly.is_some()
    }

    /// Whether what it makes of a matrix goes by a text.
    pub fn finds_by_text(&self) -> bool {
        self.rule != Rule::Magnitude || self.reconstruct.is_some()
    }

    /// Has every matrix get one of its forms, so that all take so much of their bytes at most.
    ///
    /// # Errors
    /// It says already what stays dense.
    pub fn assign(&mut self, ratio: Share) -> Result<()> {
        match self.partly.replace(Partly::Ratio(ratio)) {
            None => Ok(()),
            Some(before) => Err(Error::Invalid(format!(
                "{before} and a ratio of {ratio} both say which matrices stay dense: give one of them"
            ))),
        }
    }

    /// Whether a text asks for one, rightly or not. `sparse24` alone is a method, which stores what is sparse already.
    pub fn names(text: &str) -> bool {
        text.strip_prefix(NAME).is_some_and(|rest| rest.starts_with([':', ',', '=']))
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        match self.reconstruct.and_then(|reconstruct| reconstruct.steps) {
            Some(steps) if steps == 0 || steps > Reconstruct::MOST_STEPS => {
                Err(Error::Invalid(format!("steps of reconstruction: 1 to {}", Reconstruct::MOST_STEPS)))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for Sparsifier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |what: String| Error::Invalid(format!("{text:?}: {what}"));
        let rest = text.strip_prefix(NAME).map_or(text, |rest| rest.strip_prefix(':').unwrap_or(rest));
        let mut options = rest.split(',');
        let head = options.next().unwrap_or_default();
        let Some(rule) = Rule::ALL.into_iter().find(|rule| rule.name() == head) else {
            return Err(bad(format!(
                "{head:?} is no way to find 2:4 masks: magnitude, wanda or sparsegpt, as in {NAME}:sparsegpt,reconstruct"
            )));
        };
        let (mut permute, mut reconstruct, mut slorb, mut steps, mut seed) =
            (false, false, false, None, None);
        let mut partly = None;
        for option in options {
            let (name, value) =
                option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
            match (name, value) {
                ("permute" | "reconstruct" | "slorb", None) => {
                    let to = match name {
                        "permute" => &mut permute,
                        "slorb" => &mut slorb,
                        _ => &mut reconstruct,
                    };
                    if std::mem::replace(to, true) {
                        return Err(bad(format!("says {name} twice")));
                    }
                }
                ("steps" | "seed", value) => {
                    let number = value.and_then(|digits| digits.parse::<u32>().ok());
                    let to = if name == "steps" { &mut steps } else { &mut seed };
                    let Some(number) = number.filter(|_| to.is_none()) else {
                        return Err(bad(format!("{option:?}: {name}=NUMBER, once")));
                    };
                    *to = Some(number);
                }
                ("dense" | "ratio", Some(value)) => {
                    let read = match name {
                        "dense" => Share::percent(value).map(Partly::Dense),
                        _ => value.parse().ok().map(Partly::Ratio),
                    };
                    let Some(read) = read else {
                        return Err(bad(format!(
                            "{option:?}: a share above none and below all, as dense=10% of the weights or ratio=0.6 of the bytes"
                        )));
                    };
                    if let Some(before) = partly.replace(read) {
                        return Err(bad(format!(
                            "{before} and {read} both say which matrices stay dense: give one of them"
                        )));
                    }
                }
                _ => {
                    return Err(bad(format!(
                        "there is no option {option:?}: permute, reconstruct, slorb, steps=150, seed=0, dense=10%, ratio=0.6"
                    )));
                }
            }
        }
        if !reconstruct && (steps.is_some() || seed.is_some()) {
            return Err(bad("steps and seed are of reconstruction: say reconstruct as well".to_owned()));
        }
        let reconstruct = reconstruct.then(|| Reconstruct { steps, seed: seed.map_or(0, u64::from) });
        let sparsifier = Self { rule, permute, reconstruct, slorb, partly };
        sparsifier.check().map_err(|e| bad(e.to_string()))?;
        Ok(sparsifier)
    }
}

impl fmt::Display for Sparsifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{NAME}:{}", self.rule)?;
        if self.permute {
            f.write_str(",permute")?;
        }
        if let Some(Reconstruct { steps, seed }) = self.reconstruct {
            f.write_str(",reconstruct")?;
            if let Some(steps) = steps {
                write!(f, ",steps={steps}")?;
            }
            if seed != 0 {
                write!(f, ",seed={seed}")?;
            }
        }
        if self.slorb {
            f.write_str(",slorb")?;
        }
        if let Some(partly) = self.partly {
            write!(f, ",{partly}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back_as_it_was() {
        let mut all = Vec::new();
        for rule in Rule::ALL {
            for steps in [None, Some(1), Some(150)] {
                for seed in [0, 7] {
                    for slorb in [false, true] {
                        for partly in ["", "dense=12.5%", "ratio=0.6"] {
                            let partly = match partly.split_once('=') {
                                Some(("dense", share)) => Share::percent(share).map(Partly::Dense),
                                Some((_, share)) => Some(Partly::Ratio(share.parse().unwrap())),
                                None => None,
                            };
                            let reconstruct = Some(Reconstruct { steps, seed });
                            for permute in [false, true] {
                                all.push(Sparsifier { rule, permute, reconstruct, slorb, partly });
                                all.push(Sparsifier { rule, permute, reconstruct: None, slorb, partly });
                            }
                        }
                    }
                }
            }
        }
        for sparsifier in all {
            let text = sparsifier.to_string();
            assert!(Sparsifier::names(&text), "{text}");
            assert_eq!(text.parse::<Sparsifier>().unwrap(), sparsifier, "{text}");
            let short = text.strip_prefix("sparse24:").unwrap();
            assert_eq!(short.parse::<Sparsifier>().unwrap(), sparsifier, "{short}");
        }
        assert_eq!("wanda,slorb".parse::<Sparsifier>().unwrap().to_string(), "sparse24:wanda,slorb");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would_be_right() {
        for (text, what) in [
            ("", "magnitude, wanda or sparsegpt"),
            ("sparse24:", "magnitude, wanda or sparsegpt"),
            ("sparse24:gptq", "magnitude, wanda or sparsegpt"),
            ("sparse24:wanda,w4", "no option \"w4\""),
            ("sparse24:wanda,reconstruct=3", "no option"),
            ("sparse24:wanda,slorb,slorb", "twice"),
            ("sparse24:wanda,permute,permute", "twice"),
            ("sparse24:wanda,permute=1", "no option"),
            ("sparse24:wanda,steps=3", "say reconstruct as well"),
            ("sparse24:wanda,reconstruct,steps=0", "1 to 100000"),
            ("sparse24:wanda,reconstruct,steps=4,steps=5", "once"),
            ("sparse24:wanda,reconstruct,seed=-1", "seed=NUMBER"),
            ("sparse24:wanda,dense=10", "dense=10% of the weights"),
            ("sparse24:wanda,dense=100%", "below all"),
            ("sparse24:wanda,ratio=1", "below all"),
            ("sparse24:wanda,ratio=60%", "ratio=0.6 of the bytes"),
            ("sparse24:wanda,dense=10%,ratio=0.6", "dense=10% and ratio=0.6 both"),
            ("sparse24:wanda,dense", "no option"),
        ] {
            let error = text.parse::<Sparsifier>().unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
        assert!(!Sparsifier::names("sparse24") && !Sparsifier::names("wanda"));
        assert!(Sparsifier::names("sparse24:x") && Sparsifier::names("sparse24=x"));
    }
}
