//! What the stand-in pretends to be, and what goes wrong.

use std::path::PathBuf;

use crate::code::Code;

/// The environment variable that is read when the library is loaded: `key=value` pairs with semicolons between them.
///
/// | key | what | otherwise |
/// |---|---|---|
/// | `devices` | GPUs | 1 |
/// | `driver` | CUDA version times 1000, as the driver gives it | 12040 |
/// | `capability` | compute capability | 9.0 |
/// | `memory` | bytes of each GPU | 4 GiB |
/// | `multiprocessors` | multiprocessors | 4 |
/// | `shared` | bytes of shared memory that a block may ask for | 227 KiB |
/// | `init` | what `cuInit` returns | 0 |
/// | `lose` | the call at which the GPU is lost: `1200`, or `cuGraphLaunch:2` for the second of a name | never |
/// | `lost` | what every call from then on returns | 719 |
/// | `refuse` | a kernel whose PTX does not compile | none |
/// | `log` | a file that gets a line for each call, `fault` and `leak` | none |
pub const SETTINGS: &str = "LLMPRESS_STANDIN";

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) driver: i32,
    pub(crate) capability: (i32, i32),
    pub(crate) memory: usize,
    pub(crate) multiprocessors: i32,
    pub(crate) shared: u32,
    pub(crate) init: Code,
    pub(crate) lose: Option<Loss>,
    pub(crate) lost: Code,
    pub(crate) refuse: Option<String>,
    pub(crate) log: Option<PathBuf>,
}

/// When the GPU is lost: at a call, or at one of a name.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    pub(crate) name: Option<String>,
    pub(crate) count: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            devices: 1,
            driver: 12040,
            capability: (9, 0),
            memory: 4 << 30,
            multiprocessors: 4,
            shared: 227 << 10,
            init: Code::SUCCESS,
            lose: None,
            lost: Code::LAUNCH_FAILED,
            refuse: None,
            log: None,
        }
    }
}

impl Settings {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut settings = Self::default();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not key=value"))?;
            settings.set(key, value).ok_or_else(|| format!("{pair:?} is not a setting"))?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "devices" => self.devices = value.parse().ok()?,
            "driver" => self.driver = value.parse().ok()?,
            "capability" => {
                let (major, minor) = value.split_once('.')?;
                self.capability = (major.parse().ok()?, minor.parse().ok()?);
            }
            "memory" => self.memory = value.parse().ok()?,
            "multiprocessors" => self.multiprocessors = value.parse().ok()?,
            "shared" => self.shared = value.parse().ok().filter(|bytes| *bytes <= 227 << 10)?,
            "init" => self.init = Code(value.parse().ok()?),
            "lose" => {
                let (name, count) = match value.split_once(':') {
                    Some((name, count)) => (Some(name.to_owned()), count),
                    None => (None, value),
                };
                self.lose = Some(Loss { name, count: count.parse().ok()? });
            }
            "lost" => self.lost = Code(value.parse().ok()?),
            "refuse" => self.refuse = Some(value.to_owned()),
            "log" => self.log = Some(value.into()),
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn settings_are_read_and_misspelt_ones_refused() {
        let settings = Settings::parse("memory=1000;capability=8.6;lose=cuGraphLaunch:2;").unwrap();
        assert_eq!((settings.memory, settings.capability, settings.devices), (1000, (8, 6), 1));
        assert_eq!(settings.lose.unwrap().name.unwrap(), "cuGraphLaunch");
        for wrong in ["memory", "memory=much", "mmory=1", "capability=8", "shared=1000000", "lose=x:"] {
            assert!(Settings::parse(wrong).is_err(), "{wrong}");
        }
    }
}
