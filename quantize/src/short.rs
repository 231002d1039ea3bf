//! The short form of a quantiser.
//!
//! ```text
//! gptq : w4 a8 , g128 , symmetric , rotate=r2r4 , qkv4 , kv8 , learn
//! rung : bits of weights [*] [a bits of activations] [, groups] [, zero point] [, transformations] [, learning]
//!        w3.5: a mean of true bits, widths assigned matrix by matrix
//! ```

use llmpress_formats::encoding::abq::{Abq, BITS, WORD_COLUMNS};
use llmpress_formats::{Error, Result};

use crate::{
    Beside, Grain, Learn, LearnedPart, MeanBits, Quantiser, Rotate, Rung, Spec, Transformations, ZeroPoint,
};

/// Names of rungs; `abq` is the best that there is.
const RUNGS: [(&str, Rung); 4] =
    [("rtn", Rung::Rtn), ("grid", Rung::Grid), ("gptq", Rung::Gptq), ("abq", Rung::Gptq)];
/// What stands for activations in floating point.
const FLOATING: u8 = 16;

/// Whether a text asks for a quantiser, rightly or not. `abq` alone is a method.
pub(crate) fn names(text: &str) -> bool {
    let head = text.split([':', '=', ',']).next();
    text != "abq" && RUNGS.iter().any(|(name, _)| head == Some(name))
}

/// Reads it.
pub(crate) fn parse(text: &str) -> Result<Quantiser> {
    let bad = |what: String| Error::Invalid(format!("{text:?}: {what}"));
    let (head, rest) = text.split_once(':').unwrap_or((text, ""));
    let rung = RUNGS.iter().find(|(name, _)| *name == head);
    let Some((_, rung)) = rung else {
        return Err(bad(format!("{head:?} is no quantiser: rtn, grid, gptq or abq")));
    };
    let mut options = rest.split(',');
    let (mut abq, mean) = widths(options.next().unwrap_or_default()).map_err(bad)?;
    let (mut zero, mut with) = (None, Transformations::default());
    let (mut learn, mut steps, mut epochs, mut seed) = (None, None, None, None);
    let (mut of, mut beside) = (None, Beside::default());
    for option in options {
        let (name, value) =
            option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let number = |prefix: &str| option.strip_prefix(prefix).and_then(|size| size.parse::<u32>().ok());
        match name {
            "symmetric" | "int" if value.is_none() => {
                let kind = if name == "int" { ZeroPoint::Integer } else { ZeroPoint::Symmetric };
                if zero.replace(kind).is_some() {
                    return Err(bad("says twice where zero lies".to_owned()));
                }
            }
            "rotate" => {
                let rotate = value.map_or(Ok(Rotate::ALL), str::parse).map_err(|e| bad(e.to_string()))?;
                if with.rotate.replace(rotate).is_some() {
                    return Err(bad("rotates twice".to_owned()));
                }
            }
            "smooth" if value.is_none() => with.smooth = true,
            "learn" if matches!(value, None | Some("block" | "model")) => {
                let grain = match value {
                    None => Grain::SubLayer,
                    Some("block") => Grain::Block,
                    Some(_) => Grain::Model,
                };
                if learn.replace(grain).is_some() {
                    return Err(bad("learns twice".to_owned()));
                }
            }
            "clip" | "round" if value.is_none() => {
                let part = if name == "clip" { LearnedPart::Clip } else { LearnedPart::Round };
                if of.replace(part).is_some() {
                    return Err(bad("says twice what of a matrix is learned".to_owned()));
                }
            }
            "scale" if value.is_none() => beside.scale = true,
            "compensate" if value.is_none() => beside.compensate = true,
            "correct" if value.is_none() => beside.correct = true,
            "maps" if value.is_none() => beside.maps = true,
            "steps" | "epochs" | "seed" => {
                let number = value.and_then(|digits| digits.parse::<u32>().ok());
                let to = match name {
                    "steps" => &mut steps,
                    "epochs" => &mut epochs,
                    _ => &mut seed,
                };
                if number.is_none() || to.replace(number).is_some() {
                    return Err(bad(format!("{option:?}: {name}=NUMBER, once")));
                }
            }
            _ => match (number("g"), number("qkv"), number("kv")) {
                (Some(_), ..) if abq.group_size.is_some() => {
                    return Err(bad("has two group sizes".to_owned()));
                }
                (Some(size), ..) if size > 0 && (size as usize).is_multiple_of(WORD_COLUMNS) => {
                    abq.group_size = Some(size);
                }
                (Some(size), ..) => {
                    return Err(bad(format!(
                        "groups of {size} columns: a multiple of {WORD_COLUMNS} it must be"
                    )));
                }
                (_, Some(_), _) if with.qkv_bits.is_some() => {
                    return Err(bad("says twice what query, key and value have".to_owned()));
                }
                (_, Some(bits), _) => with.qkv_bits = Some(u8::try_from(bits).unwrap_or(u8::MAX)),
                (_, _, Some(_)) if with.cache_bits.is_some() => {
                    return Err(bad("says twice what the cache has".to_owned()));
                }
                (_, _, Some(bits)) => with.cache_bits = Some(u8::try_from(bits).unwrap_or(u8::MAX)),
                (None, None, None) => {
                    return Err(bad(format!(
                        "there is no option {option:?}: g128 (or other groups), int, symmetric, rotate, smooth, qkv4 (or \
                         other bits), kv8 or kv4, learn, learn=block, learn=model, clip, round, scale, compensate, correct, maps, steps=400, epochs=8, seed=0"
                    )));
                }
            },
        }
    }
    let parts =
        steps.is_some() || epochs.is_some() || seed.is_some() || of.is_some() || beside != Beside::default();
    if learn.is_none() && parts {
        return Err(
            bad("steps, epochs, seed and parts are of what is learned: say learn as well".to_owned()),
        );
    }
    let learn = learn.map(|grain| Learn {
        steps: steps.flatten(),
        epochs: epochs.flatten(),
        seed: seed.flatten().map_or(0, u64::from),
        grain,
        of: of.unwrap_or_default(),
        beside,
    });
    let spec = Spec { abq, zero: zero.unwrap_or_default(), rung: *rung, learn };
    spec.check().and_then(|()| with.check()).map_err(|e| bad(e.to_string()))?;
    Ok(Quantiser { spec, with, mean })
}

/// `w4`, `w2*a8`, `w4a16`.
fn widths(text: &str) -> Result<(Abq, Option<MeanBits>), String> {
    let form =
        || format!("{text:?} says no widths: w4 (weights of 4 bits), w4a8 (activations of 8, too), w2*a8");
    let (weights, activations) = match text.strip_prefix('w').ok_or_else(form)?.split_once('a') {
        Some((weights, activations)) => (weights, Some(activations)),
        None => (text.strip_prefix('w').ok_or_else(form)?, None),
    };
    let (digits, balanced) = weights.strip_suffix('*').map_or((weights, false), |digits| (digits, true));
    let (digits, mean) = match digits.split_once('.') {
        None => (digits, None),
        Some((whole, _)) => (whole, Some(digits.parse::<MeanBits>().map_err(|e| e.to_string())?)),
    };
    if balanced && mean.is_some() {
        return Err(format!("w{weights}: a mean of several widths has no balanced grids"));
    }
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse::<u8>().unwrap_or(u8::MAX)).ok_or_else(form)
    };
    let bits = number(digits)?;
    if !BITS.contains(&bits) {
        return Err(format!("weights of {digits} bits: 1 to 8 there are"));
    }
    if balanced && bits > 2 {
        return Err(format!("w{bits}*: 1 and 2 bits are balanced by one level more (w1*, w2*)"));
    }
    let activation_bits = match activations {
        None => None,
        Some(digits) => match number(digits)? {
            FLOATING => None,
            bits if BITS.contains(&bits) => Some(bits),
            _ => {
                return Err(format!(
                    "activations of {digits} bits: 1 to 8 there are, or 16 for floating point"
                ));
            }
        },
    };
    Ok((Abq { bits, balanced, group_size: None, activation_bits }, mean))
}

/// Writes it, in the one form that recipes record.
pub(crate) fn print(quantiser: &Quantiser) -> String {
    let Quantiser { spec, with, mean } = quantiser;
    let widths = spec.abq.widths();
    let widths = match (mean, widths.strip_prefix(&format!("w{}", spec.abq.bits))) {
        (Some(mean), Some(rest)) => format!("w{:?}{rest}", mean.bits()),
        _ => widths,
    };
    let zero = match spec.zero {
        ZeroPoint::Real => "",
        ZeroPoint::Integer => ",int",
        ZeroPoint::Symmetric => ",symmetric",
    };
    let rotate = with.rotate.map(|rotate| format!(",rotate={rotate}")).unwrap_or_default();
    let smooth = if with.smooth { ",smooth" } else { "" };
    let qkv = with.qkv_bits.map(|bits| format!(",qkv{bits}")).unwrap_or_default();
    let cache = with.cache_bits.map(|bits| format!(",kv{bits}")).unwrap_or_default();
    let learn = spec.learn.map(|learn| {
        let steps = learn.steps.map(|steps| format!(",steps={steps}")).unwrap_or_default();
        let epochs = learn.epochs.map(|epochs| format!(",epochs={epochs}")).unwrap_or_default();
        let seed = if learn.seed == 0 { String::new() } else { format!(",seed={}", learn.seed) };
        let grain = match learn.grain {
            Grain::SubLayer => "",
            Grain::Block => "=block",
            Grain::Model => "=model",
        };
        let of = match learn.of {
            LearnedPart::Places => "",
            LearnedPart::Clip => ",clip",
            LearnedPart::Round => ",round",
        };
        let Beside { scale, compensate, correct, maps } = learn.beside;
        let beside = [(scale, "scale"), (compensate, "compensate"), (correct, "correct"), (maps, "maps")];
        let beside = beside.iter().filter(|(on, _)| *on).map(|(_, name)| format!(",{name}"));
        format!(",learn{grain}{of}{}{steps}{epochs}{seed}", beside.collect::<String>())
    });
    let learn = learn.unwrap_or_default();
    format!("{}:{widths}{zero}{rotate}{smooth}{qkv}{cache}{learn}", spec.rung.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms_are_written_as_they_are_read() {
        for (text, canonical) in [
            ("rtn:w8", "rtn:w8"),
            ("abq:w4a8", "gptq:w4a8"),
            ("gptq:w4a16,g128", "gptq:w4,g128"),
            ("grid:w2*a8,symmetric,g64", "grid:w2*a8,g64,symmetric"),
            ("rtn:w1*", "rtn:w1*"),
            ("rtn:w1,int", "rtn:w1,int"),
            ("abq:w4a4,rotate", "gptq:w4a4,rotate=r1r2r4"),
            ("abq:w2,g128,learn", "gptq:w2,g128,learn"),
            ("abq:w2,learn,g128,seed=7,steps=300", "gptq:w2,g128,learn,steps=300,seed=7"),
            ("abq:w2,learn,seed=0", "gptq:w2,learn"),
            ("abq:w2,round,learn", "gptq:w2,learn,round"),
            ("abq:w2,learn,epochs=12", "gptq:w2,learn,epochs=12"),
            ("abq:w2a8,learn=model,steps=9,rotate", "gptq:w2a8,rotate=r1r2r4,learn=model,steps=9"),
            (
                "abq:w2*a8,maps,correct,scale,compensate,clip,learn=block,steps=9",
                "gptq:w2*a8,learn=block,clip,scale,compensate,correct,maps,steps=9",
            ),
            ("gptq:w3.50a8,g128,int", "gptq:w3.5a8,g128,int"),
            ("gptq:w3.0", "gptq:w3.0"),
            ("grid:w2.25", "grid:w2.25"),
            ("gptq:w4,kv4,g128", "gptq:w4,g128,kv4"),
            ("rtn:w8a8,kv8,qkv8,rotate=r4", "rtn:w8a8,rotate=r4,qkv8,kv8"),
            ("gptq:w6a6,qkv6,smooth,rotate=r2r4,g64", "gptq:w6a6,g64,rotate=r2r4,smooth,qkv6"),
        ] {
            let quantiser = parse(text).unwrap();
            assert_eq!(print(&quantiser), canonical);
            assert_eq!(parse(canonical).unwrap(), quantiser);
            assert!(names(text));
        }
        let spec = parse("abq:w2*a8,g64").unwrap().spec;
        assert_eq!(spec.abq, Abq { bits: 2, balanced: true, group_size: Some(64), activation_bits: Some(8) });
        assert!(
            !names("drop:attn=8") && !names("raw") && !names("abq") && names("abq:nonsense") && names("rtn")
        );
    }

    #[test]
    fn widths_out_of_range_and_unknown_options_are_named() {
        for (text, words) in [
            ("rtn", "says no widths"),
            ("rtn:", "says no widths"),
            ("rtn:4", "says no widths"),
            ("rtn:w", "says no widths"),
            ("rtn:w4a", "says no widths"),
            ("rtn:w+4", "says no widths"),
            ("rtn:w0", "weights of 0 bits: 1 to 8"),
            ("rtn:w9", "weights of 9 bits: 1 to 8"),
            ("rtn:w3.", "no mean of bits"),
            ("rtn:w3.125", "no mean of bits"),
            ("rtn:w.5", "no mean of bits"),
            ("rtn:w9.5", "no mean of bits"),
            ("rtn:w0.5", "no mean of bits"),
            ("rtn:w3.+5", "no mean of bits"),
            ("rtn:w2.5*", "no balanced grids"),
            ("rtn:w99999", "weights of 99999 bits: 1 to 8"),
            ("rtn:w4a0", "activations of 0 bits"),
            ("rtn:w4a9", "activations of 9 bits"),
            ("rtn:w4a15", "1 to 8 there are, or 16"),
            ("rtn:w3*", "w3*"),
            ("rtn:w4,g0", "groups of 0"),
            ("rtn:w4,g100", "a multiple of 32"),
            ("rtn:w4,g64,g128", "two group sizes"),
            ("rtn:w4,int,symmetric", "twice"),
            ("rtn:w1,symmetric", "w1*"),
            ("rtn:w4,fast", "there is no option \"fast\""),
            ("rtn:w4,int=1", "there is no option \"int=1\""),
            ("rtn:w4,rotate=r3", "are no rotations"),
            ("rtn:w4,rotate,rotate=r2", "rotates twice"),
            ("rtn:w4,smooth,rotate", "leaves nothing to scale"),
            ("rtn:w4,qkv9", "qkv9"),
            ("rtn:w4,qkv4,qkv8", "twice"),
            ("rtn:w4,qkv0", "qkv0"),
            ("rtn:w4,kv16", "kv16"),
            ("rtn:w4,kv5", "4 or 8 bits"),
            ("rtn:w4,kv4,kv8", "twice what the cache"),
            ("rtn:w4,kv", "no option \"kv\""),
            ("grid:w4,learn", "is no start to learn from"),
            ("gptq:w4,steps=5", "say learn as well"),
            ("gptq:w4,learn,steps=0", "1 to 100000"),
            ("gptq:w4,learn,epochs=0", "1 and more"),
            ("gptq:w4,learn,epochs=2,steps=5", "give one of them"),
            ("gptq:w4,learn,scale", "say learn=block"),
            ("gptq:w4,learn=layer", "there is no option"),
            ("gptq:w4,learn=model,scale", "say learn=block"),
            ("gptq:w4,learn=model,maps", "say learn=block"),
            ("gptq:w4,learn=model,learn", "learns twice"),
            ("grid:w4,learn=model", "is no start to learn from"),
            ("gptq:w4,learn,clip,round", "says twice what of a matrix"),
            ("gptq:w4,learn,learn=block", "learns twice"),
            ("gptq:w4,maps", "say learn as well"),
            ("gptq:w4,learn,steps", "steps=NUMBER"),
            ("gptq:w4,learn,seed=1,seed=2", "once"),
            ("zip:w4", "is no quantiser"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(text), "{error}");
        }
    }
}
