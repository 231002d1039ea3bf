//! What the driver must know of a module's PTX.

/// A kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Bytes of each parameter.
    pub(crate) parameters: Vec<usize>,
    /// Most threads of a block, where it says so.
    pub(crate) threads: Option<u32>,
}

/// A module.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// PTX version, major and minor.
    pub(crate) version: (i32, i32),
    /// Compute capability times 10.
    pub(crate) target: i32,
    /// Whether it is for this capability only: `sm_90a`.
    pub(crate) only: bool,
    pub(crate) entries: Vec<Entry>,
}

/// The rest of the first line that starts with a directive.
fn directive<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim)
}

pub(crate) fn parse(text: &str) -> Result<Module, String> {
    let missing = |what: &str| format!("has no {what}");
    let version = directive(text, ".version ").and_then(|rest| rest.split_once('.'));
    let (major, minor) = version.ok_or_else(|| missing(".version"))?;
    let number = |digits: &str| digits.parse::<i32>().map_err(|_| format!("{digits:?} is no number"));
    let target = directive(text, ".target sm_").ok_or_else(|| missing(".target"))?;
    let (digits, only) = target.strip_suffix('a').map_or((target, false), |digits| (digits, true));
    if directive(text, ".address_size") != Some("64") {
        return Err(missing(".address_size of 64"));
    }
    Ok(Module {
        version: (number(major)?, number(minor)?),
        target: number(digits)?,
        only,
        entries: text.split(".entry ").skip(1).map(entry).collect::<Result<_, _>>()?,
    })
}

/// What follows `.entry`.
fn entry(text: &str) -> Result<Entry, String> {
    let (name, rest) = text.split_once('(').ok_or("an entry without parameters")?;
    let (parameters, rest) = rest.split_once(')').ok_or("an entry without an end of its parameters")?;
    let (attributes, _) = rest.split_once('{').ok_or("an entry without a body")?;
    let threads = directive(attributes, ".maxntid ").map(|sizes| {
        sizes.split(',').map(|size| size.trim().parse().unwrap_or(1)).fold(1, u32::saturating_mul)
    });
    let parameters = parameters.split(',').filter(|one| !one.trim().is_empty()).map(bytes);
    Ok(Entry { name: name.trim().to_owned(), parameters: parameters.collect::<Result<_, _>>()?, threads })
}

/// The size of a parameter: `.param .u64 name`.
fn bytes(parameter: &str) -> Result<usize, String> {
    let kind = parameter.trim().strip_prefix(".param").and_then(|rest| rest.split_whitespace().next());
    match kind {
        Some(".u64" | ".b64" | ".s64" | ".f64") => Ok(8),
        Some(".u32" | ".b32" | ".s32" | ".f32") => Ok(4),
        _ => Err(format!("a parameter {:?}", parameter.trim())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn entries_and_what_they_take_are_found() {
        let text = "// Generated\n.version 8.4\n.target sm_90a\n.address_size 64\n\n.visible .entry one(\n\
                    \t.param .u64 one_0,\n\t.param .u64 .ptr .global .align 16 one_1,\n\t.param .f32 one_2\n)\n\
                    .maxntid 256, 1, 1\n{\n\tret;\n}\n.visible .entry none()\n{\n\tret;\n}\n";
        let module = parse(text).unwrap();
        assert_eq!((module.version, module.target, module.only), ((8, 4), 90, true));
        assert_eq!(module.entries[0].name, "one");
        assert_eq!(module.entries[0].parameters, [8, 8, 4]);
        assert_eq!(module.entries[0].threads, Some(256));
        assert_eq!((module.entries[1].parameters.len(), module.entries[1].threads), (0, None));
        let cut = &text[..text.find(".maxntid").unwrap()];
        for wrong in ["", ".version 8.4\n", cut, &text.replace(".f32", ".b8")] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
