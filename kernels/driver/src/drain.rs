//! How the work of a stream is done when somebody waits for it.

use llmpress_kernels::gpu::{Backend, Error, Launch};

use crate::code::{Code, Outcome};
use crate::state::State;
use crate::things::{Handle, Recorded};
use crate::work::Work;

impl State {
    /// Does all that is queued on a stream.
    pub(crate) fn drain(&mut self, stream: Handle) -> Outcome {
        let Some(found) = self.streams.get_mut(&stream) else { return Ok(()) };
        let (context, queue) = (found.context, std::mem::take(&mut found.queue));
        let Some(device) = self.devices.iter().position(|device| device.context == context) else {
            return Err(Code::CONTEXT_IS_DESTROYED);
        };
        // A kernel that fails takes the context with it, and what is queued is not done any more.
        queue.iter().try_for_each(|work| self.run(device, work)).inspect_err(|code| {
            self.devices[device].broken = Some(*code);
        })
    }

    /// Does all that is queued on the streams of a GPU. Those come first that were made last: nothing orders them.
    pub(crate) fn drain_device(&mut self, device: usize) -> Outcome {
        let context = self.devices[device].context;
        let streams: Vec<Handle> = self
            .streams
            .iter()
            .filter(|(_, s)| s.context == context)
            .map(|(handle, _)| *handle)
            .rev()
            .collect();
        streams.into_iter().try_for_each(|stream| self.drain(stream))
    }

    fn run(&mut self, device: usize, work: &Work) -> Outcome {
        match work {
            Work::Graph(all) => return all.iter().try_for_each(|work| self.run(device, work)),
            Work::Record(event) => {
                let Some(emulator) = &self.devices[device].emulator else {
                    return Err(Code::CONTEXT_IS_DESTROYED);
                };
                if let Some(event) = self.events.get_mut(event) {
                    event.recorded = Recorded::At(emulator.clock());
                }
                return Ok(());
            }
            Work::Launch(launch) if !self.modules.contains_key(&launch.module) => {
                self.log
                    .fault(&format!("{}/{} runs after its module was unloaded", launch.file, launch.kernel));
                return Err(Code::ILLEGAL_ADDRESS);
            }
            _ => {}
        }
        let Some(emulator) = &self.devices[device].emulator else { return Err(Code::CONTEXT_IS_DESTROYED) };
        let done = match work {
            Work::Write { to, data } => emulator.write(*to, data),
            Work::Copy { from, to, bytes } => emulator.copy(*from, *to, *bytes),
            Work::Fill { at, value, bytes } => emulator.write(*at, &vec![*value; *bytes]),
            Work::Launch(launch) => emulator.launch(&Launch {
                file: launch.file,
                kernel: launch.kernel,
                grid: launch.grid,
                block: launch.block,
                shared: launch.shared,
                arguments: &launch.arguments,
                overlaps: launch.overlaps,
            }),
            Work::Product(product) => product.run(emulator),
            Work::Graph(_) | Work::Record(_) => Ok(()),
        };
        done.map_err(|error| {
            self.log.fault(&error.to_string());
            match error {
                Error::Fault { .. } => Code::ILLEGAL_ADDRESS,
                _ => Code::LAUNCH_FAILED,
            }
        })
    }
}
