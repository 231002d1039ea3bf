//! What a run is asked for, as it is written.
//!
//! ```text
//! ast : steps=2000 [, kd=0.67] [, lr=0.0002] [, decay=0.005] [, anneal=0.2] [, every=10] [, batch=8] [, window=256] [, seed=0]
//!       [, fixed] [, static] [, slorb] [, blockwise]
//! ```

use std::fmt;
use std::str::FromStr;

use llmpress_formats::{Error, Result};

/// What the text begins with.
const NAME: &str = "ast";
/// What there is to say.
const OPTIONS: &str = "steps=2000, kd=0.67, lr=0.0002, decay=0.005, anneal=0.2, every=10, batch=8, window=256, seed=0, fixed, \
                       static, slorb, blockwise";

/// How a model is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ast {
    /// Steps.
    pub steps: u32,
    /// The share of the divergence from the dense model in the loss, 0 to 1; the likelihood of the text has the rest.
    pub kd: f32,
    /// The greatest rate.
    pub rate: f32,
    /// The decay of dropped weights, lambda, at its greatest; [`Self::SUPPRESSION`] where nothing is said.
    pub decay: Option<f32>,
    /// The share of steps over which it grows to that; 0: it is there from the start.
    pub anneal: f32,
    /// Steps after which masks are found again; 0: never.
    pub every: u32,
    /// Windows of a step.
    pub batch: u32,
    /// Tokens of a window.
    pub window: u32,
    /// What shuffles windows.
    pub seed: u32,
    /// Whether sums of inputs, 16 columns each, get weights of their own where the start has none.
    pub slorb: bool,
    /// Whether each sub-layer is trained by itself, against what the dense one gives out. Steps are then of each.
    pub blockwise: bool,
}

impl Default for Ast {
    fn default() -> Self {
        Self {
            steps: 2000,
            kd: 2.0 / 3.0,
            rate: 2e-4,
            decay: None,
            anneal: 0.2,
            every: 10,
            batch: 8,
            window: 256,
            seed: 0,
            slorb: false,
            blockwise: false,
        }
    }
}

impl Ast {
    /// What decay comes to where nothing is said of it: lambda |W| as a share of the derivatives' norm, which is at most 1. The paper's
    /// values (6e-5 for LLaMA-7B, 1e-4 for GPT-2) are a tenth so of their models' weights; measured on tinylm more is better.
    pub const SUPPRESSION: f32 = 0.6;

    /// The most steps.
    pub const MOST_STEPS: u32 = 10_000_000;

    /// Whether a text asks for it, rightly or not.
    pub fn names(text: &str) -> bool {
        text.strip_prefix(NAME).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ',', '=']))
    }

    /// Tokens of a step.
    pub fn tokens(&self) -> usize {
        self.batch as usize * self.window as usize
    }

    /// The greatest decay, for weights whose squares sum up to so much.
    pub(super) fn lambda(&self, squares: f64) -> f32 {
        let by_size = f64::from(Self::SUPPRESSION) / squares.sqrt();
        self.decay.unwrap_or(by_size.min(1.0) as f32)
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`Error::Invalid`], with what would be right.
    pub fn check(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::Invalid(what.to_owned()));
        let within = |x: f32, most: f32| x.is_finite() && (0.0..=most).contains(&x);
        match self {
            a if a.steps == 0 || a.steps > Self::MOST_STEPS => bad("steps: 1 to 10000000"),
            a if !within(a.kd, 1.0) => bad("kd, the share of the dense model in the loss: 0 to 1"),
            a if !within(a.rate, 1.0) || a.rate == 0.0 => bad("lr, the greatest rate: above 0, at most 1"),
            a if !a.decay.is_none_or(|decay| within(decay, 1.0)) => bad("decay of dropped weights: 0 to 1"),
            a if !within(a.anneal, 1.0) => bad("anneal, a share of steps: 0 to 1"),
            a if a.batch == 0 || a.batch > 4096 => bad("batch, windows of a step: 1 to 4096"),
            a if a.window < 2 || a.window > 1 << 20 => bad("window, tokens of each: 2 to 1048576"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Ast {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |what: String| Error::Invalid(format!("{text:?}: {what}"));
        let rest = text.strip_prefix(NAME).ok_or_else(|| bad(format!("begins with {NAME}")))?;
        let rest = match rest.strip_prefix(':') {
            Some(rest) => rest,
            None if rest.is_empty() => "",
            None => return Err(bad(format!("{NAME}:OPTION,OPTION with {OPTIONS}"))),
        };
        let mut ast = Self::default();
        let mut said = Vec::new();
        for option in rest.split(',').filter(|_| !rest.is_empty()) {
            let (name, value) =
                option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
            if said.contains(&name) {
                return Err(bad(format!("says {name} twice")));
            }
            said.push(name);
            let wrong = || bad(format!("{option:?}: there is {OPTIONS}"));
            let whole = || value.and_then(|v| v.parse::<u32>().ok()).ok_or_else(wrong);
            let share = || value.and_then(|v| v.parse::<f32>().ok()).ok_or_else(wrong);
            match (name, value) {
                ("steps", _) => ast.steps = whole()?,
                ("kd", _) => ast.kd = share()?,
                ("lr", _) => ast.rate = share()?,
                ("decay", _) => ast.decay = Some(share()?),
                ("anneal", _) => ast.anneal = share()?,
                ("every", _) => {
                    ast.every = whole()?;
                    if ast.every == 0 {
                        return Err(bad("every=0: masks that are never found again are `fixed`".to_owned()));
                    }
                }
                ("batch", _) => ast.batch = whole()?,
                ("window", _) => ast.window = whole()?,
                ("seed", _) => ast.seed = whole()?,
                ("fixed", None) => ast.every = 0,
                ("static", None) => ast.anneal = 0.0,
                ("slorb", None) => ast.slorb = true,
                ("blockwise", None) => ast.blockwise = true,
                _ => return Err(bad(format!("there is no option {option:?}: {OPTIONS}"))),
            }
        }
        let pairs = [("fixed", "every"), ("static", "anneal"), ("blockwise", "kd")];
        for (a, b) in pairs {
            if said.contains(&a) && said.contains(&b) {
                return Err(bad(format!("says {a} and {b}: one of them")));
            }
        }
        ast.check().map_err(|e| bad(e.to_string()))?;
        Ok(ast)
    }
}

impl fmt::Display for Ast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = Self::default();
        write!(f, "{NAME}:steps={}", self.steps)?;
        if !self.blockwise {
            // What it learns from is not the text.
            write!(f, ",kd={}", self.kd)?;
        }
        let mut number = |name: &str, value: f32, default: f32| match value == default {
            true => Ok(()),
            false => write!(f, ",{name}={value}"),
        };
        number("lr", self.rate, of.rate)?;
        if self.anneal != 0.0 {
            number("anneal", self.anneal, of.anneal)?;
        }
        if let Some(decay) = self.decay {
            write!(f, ",decay={decay}")?;
        }
        if self.anneal == 0.0 {
            f.write_str(",static")?;
        }
        match self.every {
            0 => f.write_str(",fixed")?,
            every if every != of.every => write!(f, ",every={every}")?,
            _ => {}
        }
        for (name, value, default) in [
            ("batch", self.batch, of.batch),
            ("window", self.window, of.window),
            ("seed", self.seed, of.seed),
        ] {
            if value != default {
                write!(f, ",{name}={value}")?;
            }
        }
        if self.slorb {
            f.write_str(",slorb")?;
        }
        if self.blockwise {
            f.write_str(",blockwise")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back_as_it_was() {
        for text in [
            "ast",
            "ast:steps=10",
            "ast:steps=7,kd=0.5,lr=0.001,decay=0.01,anneal=0.5,every=3,batch=2,window=32,seed=9,slorb",
            "ast:fixed",
            "ast:static,kd=0",
            "ast:static,fixed,slorb",
            "ast:kd=1",
            "ast:slorb,blockwise",
        ] {
            let ast: Ast = text.parse().unwrap();
            assert!(Ast::names(text));
            assert_eq!(ast.to_string().parse::<Ast>().unwrap(), ast, "{ast}");
        }
        assert!(!Ast::names("astonishing") && !Ast::names("sparse24:wanda"));
        assert_eq!("ast".parse::<Ast>().unwrap(), Ast::default());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would_be_right() {
        for (text, what) in [
            ("ast:steps=0", "1 to 10000000"),
            ("ast:kd=1.5", "0 to 1"),
            ("ast:kd=nan", "0 to 1"),
            ("ast:kd", "there is"),
            ("ast:steps=3,steps=4", "twice"),
            ("ast:fixed,every=3", "one of them"),
            ("ast:static,anneal=0.3", "one of them"),
            ("ast:blockwise,kd=0.5", "one of them"),
            ("ast:every=0", "fixed"),
            ("ast:lr=0", "above 0"),
            ("ast:batch=0", "1 to 4096"),
            ("ast:window=1", "2 to"),
            ("ast:wanda", "no option \"wanda\""),
            ("ast,steps=3", "OPTION"),
        ] {
            let error = text.parse::<Ast>().unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
