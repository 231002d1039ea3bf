//! How a pruning is asked for: `drop:attn=8`, `finercut:25%`.

use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Error, Result};

use crate::DistanceKind;

/// What LLM-Drop drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Attention.
    Attention,
    /// MLPs.
    Mlp,
    /// Attention and MLPs, whichever is more similar.
    Joint,
    /// Whole layers.
    Block,
}

impl Target {
    /// Its short form.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attn",
            Self::Mlp => "mlp",
            Self::Joint => "joint",
            Self::Block => "block",
        }
    }
}

/// How sub-layers are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// LLM-Drop.
    Drop {
        /// What it drops.
        target: Target,
        /// Whether similarities are measured again after each removal.
        iterative: bool,
    },
    /// FinerCut.
    FinerCut {
        /// What it minimises.
        distance: DistanceKind,
        /// The share of layers, from the first on, that is spared until the others are used up.
        protect: f64,
    },
    /// By chance.
    Random {
        /// Of the generator.
        seed: u64,
    },
    /// The last ones.
    Last,
}

/// How many are removed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// So many: layers for `drop:block`, else sub-layers.
    Count(usize),
    /// A share of all sub-layers, in percent.
    Percent(f64),
}

impl Amount {
    /// The number, of `total`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for none, or more than there are.
    pub fn of(self, total: usize, what: &str) -> Result<usize> {
        let count = match self {
            Self::Count(count) => count,
            Self::Percent(percent) => (percent / 100.0 * total as f64).round() as usize,
        };
        if count == 0 {
            return Err(Error::Invalid(format!(
                "{self} of {total} {what} is none: there is nothing to remove"
            )));
        }
        if count > total {
            return Err(Error::Invalid(format!("{count} {what} cannot be removed: there are {total}")));
        }
        Ok(count)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A pruning pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// How.
    pub method: Method,
    /// How many.
    pub amount: Amount,
    /// Keep every tensor, and make what removed sub-layers add zero.
    pub portable: bool,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.amount;
        match self.method {
            Method::Drop { target, iterative } => {
                write!(f, "drop:{}={amount}{}", target.name(), if iterative { ",iterative" } else { "" })?;
            }
            Method::FinerCut { distance, protect } => {
                write!(f, "finercut:{amount},distance={},protect={protect}", distance.name())?;
            }
            Method::Random { seed } => write!(f, "drop:random={amount},seed={seed}")?,
            Method::Last => write!(f, "drop:last={amount}")?,
        }
        f.write_str(if self.portable { ",portable" } else { "" })
    }
}

impl Pass {
    /// Whether a text asks for a pruning, rightly or not.
    pub fn names(text: &str) -> bool {
        let head = text.split([':', '=', ',']).next();
        matches!(head, Some("drop" | "finercut"))
    }

    /// Whether it needs calibration tokens.
    pub fn calibrated(&self) -> bool {
        matches!(self.method, Method::Drop { .. } | Method::FinerCut { .. })
    }

    /// The method without its amount, as rankings name it.
    pub fn ranking_name(&self) -> String {
        match self.method {
            Method::Drop { target, iterative } => {
                format!("drop:{}{}", target.name(), if iterative { ",iterative" } else { "" })
            }
            Method::FinerCut { distance, protect } => {
                format!("finercut,distance={},protect={protect}", distance.name())
            }
            Method::Random { seed } => format!("drop:random,seed={seed}"),
            Method::Last => "drop:last".to_owned(),
        }
    }
}

impl FromStr for Pass {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::Invalid(format!(
                "{text:?} is no pruning: {why}; drop:attn=8, drop:mlp=4, drop:joint=12, drop:block=4 (each with \
                 ,iterative), drop:random=12,seed=1, drop:last=12 and finercut:25% (with ,distance=js, angular \
                 or euclidean and ,protect=0.4) are, each with ,portable too"
            ))
        };
        let mut parts = text.split(',');
        let head = parts.next().unwrap_or_default();
        let (method, amount) = match head.split_once(':') {
            Some(("finercut", amount)) => {
                (Method::FinerCut { distance: DistanceKind::JensenShannon, protect: 0.4 }, amount)
            }
            Some(("drop", rest)) => {
                let (target, amount) = rest.split_once('=').ok_or_else(|| wrong("an amount is missing"))?;
                let drop = |target| Method::Drop { target, iterative: false };
                let method = match target {
                    "attn" => drop(Target::Attention),
                    "mlp" => drop(Target::Mlp),
                    "joint" => drop(Target::Joint),
                    "block" => drop(Target::Block),
                    "random" => Method::Random { seed: 0 },
                    "last" => Method::Last,
                    _ => return Err(wrong("there is no such target")),
                };
                (method, amount)
            }
            _ => return Err(wrong("it starts with neither drop: nor finercut:")),
        };
        let amount = match amount.strip_suffix('%') {
            Some(percent) => match percent.parse::<f64>() {
                Ok(percent) if percent > 0.0 && percent <= 100.0 => Amount::Percent(percent),
                _ => return Err(wrong("a share is above 0% and at most 100%")),
            },
            None => match amount.parse() {
                Ok(count) if count > 0 => Amount::Count(count),
                _ => return Err(wrong("the amount is a number above 0, or a share such as 25%")),
            },
        };
        let mut pass = Self { method, amount, portable: false };
        for option in parts {
            if option == "portable" {
                pass.portable = true;
                continue;
            }
            match (&mut pass.method, option.split_once('=').unwrap_or((option, ""))) {
                (Method::Drop { iterative, .. }, ("iterative", "")) => *iterative = true,
                (Method::Random { seed }, ("seed", value)) => {
                    *seed = value.parse().map_err(|_| wrong("the seed is a whole number"))?;
                }
                (Method::FinerCut { distance, .. }, ("distance", value)) => {
                    *distance =
                        DistanceKind::from_name(value).ok_or_else(|| wrong("there is no such distance"))?;
                }
                (Method::FinerCut { protect, .. }, ("protect", value)) => match value.parse::<f64>() {
                    Ok(share) if (0.0..=1.0).contains(&share) => *protect = share,
                    _ => return Err(wrong("the protected share is 0 to 1")),
                },
                _ => return Err(wrong(&format!("it has no option {option:?}"))),
            }
        }
        Ok(pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_read_and_mistakes_are_said() {
        let pass = |text: &str| text.parse::<Pass>().ok();
        let drop = |target, iterative| Method::Drop { target, iterative };
        let count = |method, n| Some(Pass { method, amount: Amount::Count(n), portable: false });
        assert_eq!(pass("drop:attn=8"), count(drop(Target::Attention, false), 8));
        assert_eq!(pass("drop:block=4,iterative"), count(drop(Target::Block, true), 4));
        assert_eq!(pass("drop:random=12,seed=3"), count(Method::Random { seed: 3 }, 12));
        assert_eq!(pass("drop:last=2"), count(Method::Last, 2));
        let finercut = |distance, protect| Method::FinerCut { distance, protect };
        assert_eq!(
            pass("finercut:25%"),
            Some(Pass {
                method: finercut(DistanceKind::JensenShannon, 0.4),
                amount: Amount::Percent(25.0),
                portable: false
            })
        );
        assert_eq!(
            pass("finercut:3,distance=angular,protect=0"),
            count(finercut(DistanceKind::Angular, 0.0), 3)
        );
        for text in [
            "drop:attn=8,iterative",
            "drop:joint=20%,portable",
            "drop:random=12,seed=3",
            "drop:last=2",
            "finercut:12.5%,distance=angular,protect=0.25",
        ] {
            assert_eq!(pass(text).map(|pass| pass.to_string()).as_deref(), Some(text));
        }
        assert!(Pass::names("drop") && Pass::names("finercut:x") && !Pass::names("dropout"));
        for bad in [
            "",
            "drop",
            "drop:attn",
            "drop:attn=",
            "drop:attn=0",
            "drop:attn=-1",
            "drop:heads=3",
            "finercut:0%",
            "finercut:101%",
            "finercut:25%,distance=cosine",
            "finercut:25%,iterative",
            "drop:attn=8,seed=1",
            "finercut:5,protect=2",
            "drop:last=2,iterative",
            "dfloat11",
        ] {
            assert!(bad.parse::<Pass>().is_err(), "{bad}");
        }
    }

    #[test]
    fn amounts_are_bounded() {
        assert_eq!(Amount::Percent(25.0).of(60, "sub-layers").ok(), Some(15));
        assert_eq!(Amount::Count(60).of(60, "sub-layers").ok(), Some(60));
        assert!(Amount::Count(61).of(60, "sub-layers").is_err());
        assert!(Amount::Percent(1.0).of(16, "sub-layers").is_err());
    }
}
