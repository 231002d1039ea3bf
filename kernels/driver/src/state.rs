//! Everything that the stand-in knows: GPUs, what was made on them, and by which handle.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::code::{Code, Outcome};
use crate::log::Log;
use crate::settings::{SETTINGS, Settings};
use crate::things::{Cublas, Device, Event, Function, Graph, Handle, Module, Stream};

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) log: Log,
    pub(crate) initialised: bool,
    calls: HashMap<&'static str, u64>,
    lost: bool,
    last: Handle,
    pub(crate) devices: Vec<Device>,
    pub(crate) streams: BTreeMap<Handle, Stream>,
    pub(crate) events: BTreeMap<Handle, Event>,
    pub(crate) modules: BTreeMap<Handle, Module>,
    pub(crate) functions: BTreeMap<Handle, Function>,
    pub(crate) graphs: BTreeMap<Handle, Graph>,
    pub(crate) executables: BTreeMap<Handle, Graph>,
    pub(crate) cublas: BTreeMap<Handle, Cublas>,
    /// Page-locked memory of the host, and how much.
    pub(crate) host: BTreeMap<usize, Vec<u64>>,
}

thread_local! {
    /// The calling thread's context; 0 for none.
    pub(crate) static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// The state, made from the environment when the first call comes.
pub(crate) fn with_state<T>(body: impl FnOnce(&mut State) -> T) -> T {
    let mut state: MutexGuard<'_, Option<State>> = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    body(state.get_or_insert_with(|| {
        let settings = env::var(SETTINGS).unwrap_or_default();
        State::new(&settings).unwrap_or_else(|e| {
            eprintln!("{SETTINGS}: {e}");
            std::process::exit(2)
        })
    }))
}

/// Answers a call: counts it, loses the GPU if it is time to, and writes down what was returned.
pub(crate) fn enter(name: &'static str, body: impl FnOnce(&mut State) -> Outcome) -> i32 {
    with_state(|state| {
        let outcome = state.admit(name).and_then(|()| body(state));
        let code = outcome.err().unwrap_or(Code::SUCCESS);
        state.log.call(name, code);
        code.0
    })
}

/// Changes the settings and forgets everything else. 0, or 1 where they cannot be read.
///
/// # Safety
/// `settings` ends in a zero byte.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn llmpress_standin_configure(settings: *const std::ffi::c_char) -> i32 {
    // SAFETY: as the caller promises.
    let text = unsafe { std::ffi::CStr::from_ptr(settings) }.to_string_lossy();
    with_state(|state| match State::new(&text) {
        // Handles are not given out twice: those of before are seen to be of before.
        Ok(new) => {
            *state = State { last: state.last, ..new };
            0
        }
        Err(_) => 1,
    })
}

impl State {
    fn new(settings: &str) -> Result<Self, String> {
        let settings = Settings::parse(settings)?;
        let log = Log::open(settings.log.as_deref())?;
        let devices = std::iter::repeat_with(Device::default).take(settings.devices).collect();
        Ok(Self { settings, log, devices, ..Self::default() })
    }

    fn admit(&mut self, name: &'static str) -> Outcome {
        let of_name = self.calls.entry(name).or_default();
        *of_name += 1;
        let of_name = *of_name;
        let all = self.calls.entry("").or_default();
        *all += 1;
        if let Some(loss) = &self.settings.lose {
            let reached = match &loss.name {
                Some(wanted) => wanted == name && of_name >= loss.count,
                None => *all >= loss.count,
            };
            if reached {
                self.lost = true;
            }
        }
        if self.lost { Err(self.settings.lost) } else { Ok(()) }
    }

    /// A handle that was never given out.
    pub(crate) fn handle(&mut self) -> Handle {
        self.last = self.last.max(0x1_0000) + 0x10;
        self.last
    }

    pub(crate) fn started(&mut self) -> Outcome {
        if self.initialised {
            return Ok(());
        }
        self.log.fault("a call before cuInit");
        Err(Code::NOT_INITIALIZED)
    }

    /// A GPU by its number.
    pub(crate) fn device(&mut self, device: i32) -> Outcome<usize> {
        self.started()?;
        let index = usize::try_from(device).ok().filter(|index| *index < self.devices.len());
        index.ok_or(Code::INVALID_DEVICE)
    }

    /// The GPU whose context the calling thread has.
    pub(crate) fn current(&mut self) -> Outcome<usize> {
        self.started()?;
        let context = CURRENT.get();
        if context == 0 {
            self.log.fault("a call on a thread without a context");
            return Err(Code::INVALID_CONTEXT);
        }
        let device = self.devices.iter().position(|d| d.context == context && d.retained > 0);
        let Some(device) = device else {
            self.log.fault("a call with a context that was given back");
            return Err(Code::CONTEXT_IS_DESTROYED);
        };
        self.devices[device].broken.map_or(Ok(device), Err)
    }

    /// A stream of the calling thread's context. 0 is the legacy stream of each context.
    pub(crate) fn stream(&mut self, stream: Handle) -> Outcome<Handle> {
        let device = self.current()?;
        let context = self.devices[device].context;
        // Each context has a legacy stream, under the context's own handle.
        let stream = if stream == 0 { context } else { stream };
        match self.streams.get(&stream) {
            Some(found) if found.context == context => Ok(stream),
            Some(_) => {
                self.log.fault("a stream of another context");
                Err(Code::INVALID_CONTEXT)
            }
            None => Err(self.wrong("stream")),
        }
    }

    /// Says that a handle is none, or none any more.
    pub(crate) fn wrong(&mut self, kind: &str) -> Code {
        self.log.fault(&format!("a handle that is no {kind}, or not any more"));
        Code::INVALID_HANDLE
    }

    pub(crate) fn function(&mut self, function: Handle) -> Outcome<Function> {
        let device = self.current()?;
        let Some(found) = self.functions.get(&function).cloned() else {
            return Err(self.wrong("function"));
        };
        match self.modules.get(&found.module) {
            Some(module) if module.context == self.devices[device].context => Ok(found),
            Some(_) => {
                self.log.fault("a function of another context");
                Err(Code::INVALID_CONTEXT)
            }
            None => {
                self.log.fault(&format!("{}/{} after its module was unloaded", found.file, found.name));
                Err(Code::INVALID_HANDLE)
            }
        }
    }

    /// Whether so many bytes lie in one piece of memory of the GPU.
    pub(crate) fn inside(&mut self, device: usize, address: u64, bytes: usize) -> Outcome {
        let below = self.devices[device].allocations.range(..=address).next_back();
        let inside = below.is_some_and(|(start, size)| {
            let offset = address - start;
            usize::try_from(offset).ok().and_then(|o| o.checked_add(bytes)).is_some_and(|end| end <= *size)
        });
        if inside {
            return Ok(());
        }
        self.log.fault(&format!("{bytes} bytes at {address:#x}, which are in no piece of memory"));
        Err(Code::INVALID_VALUE)
    }

    /// Ends a context, and says what it still holds, unless nothing could be given back any more.
    pub(crate) fn end_context(&mut self, device: usize) {
        let context = self.devices[device].context;
        self.streams.remove(&context);
        for (what, count) in [
            ("stream", self.streams.values().filter(|x| x.context == context).count()),
            ("event", self.events.values().filter(|x| x.context == context).count()),
            ("module", self.modules.values().filter(|x| x.context == context).count()),
            ("graph", self.graphs.values().filter(|x| x.context == context).count()),
            ("executable graph", self.executables.values().filter(|x| x.context == context).count()),
            ("piece of memory", self.devices[device].allocations.len()),
        ] {
            if count > 0 && self.devices[device].broken.is_none() {
                self.log.leak(&format!("{count} of {what}"));
            }
        }
        self.streams.retain(|_, x| x.context != context);
        self.events.retain(|_, x| x.context != context);
        self.modules.retain(|_, x| x.context != context);
        self.graphs.retain(|_, x| x.context != context);
        self.executables.retain(|_, x| x.context != context);
        self.devices[device] = Device::default();
    }
}
