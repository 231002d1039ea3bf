//! Checkpoints that are named instead of pointed to: `org/name[@revision]`, where no such directory is here.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use llmpress_hub::{Error, Headers, Hub, Id, Progress, Settings};
use llmpress_pipeline::Progress as _;

use crate::args::{BenchCommand, Command, EvalCommand};
use crate::progress::Bar;
use crate::report::{Failure, Output};

/// What a verb reads of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Headers,
    Whole,
}

/// What has to stay while a verb runs.
pub(crate) struct Held(#[expect(dead_code, reason = "directories that go when it is dropped")] Vec<Headers>);

/// Puts directories in place of the names in a command.
pub(crate) fn resolve(command: &mut Command, output: Output) -> Result<Held, Failure> {
    let planned = if let Command::Plan(args) = &*command { Some(args.dir.clone()) } else { None };
    let mut held = Vec::new();
    for (path, needs) in checkpoints(command) {
        held.extend(resolve_one(path, needs, output)?);
    }
    if let (Command::Plan(args), Some(planned)) = (command, planned)
        && args.dir != planned
    {
        args.named = planned.into_os_string().into_string().ok();
    }
    Ok(Held(held))
}

/// Puts the directory of a whole checkpoint in place of its name, if it is one.
pub(crate) fn resolve_whole(path: &mut PathBuf, output: Output) -> Result<(), Failure> {
    resolve_one(path, Needs::Whole, output).map(|_| ())
}

fn resolve_one(path: &mut PathBuf, needs: Needs, output: Output) -> Result<Option<Headers>, Failure> {
    let Some(id) = named(path) else { return Ok(None) };
    let id = id.map_err(Failure::Hub)?;
    let with_name = |error: Error| match error {
        // The checkpoint's own faults name its files.
        Error::Format(_) => Failure::Hub(error),
        error => Failure::Named(
            format!("{}: no such directory is here, and as a name on the hub", path.display()),
            error,
        ),
    };
    let hub = Hub::new(Settings::from_environment().map_err(Failure::Hub)?);
    let snapshot = match needs {
        Needs::Headers => {
            let headers = hub.headers(&id).map_err(with_name)?;
            *path = headers.path().to_owned();
            return Ok(Some(headers));
        }
        Needs::Whole => hub.snapshot(&id, &Download::new(output)).map_err(with_name)?,
    };
    if let Some(why) = &snapshot.unasked {
        output.warn(&format!("{id}: what lies in the cache is taken, which may be old: {why}"));
    }
    output.progress(&format!("{id}: commit {}, in {}", snapshot.commit, snapshot.path.display()));
    *path = snapshot.path;
    Ok(None)
}

/// The name that a path is, where nothing of the kind is here.
fn named(path: &Path) -> Option<Result<Id, Error>> {
    let text = path.to_str()?;
    (Id::looks_like_one(text) && path.symlink_metadata().is_err()).then(|| text.parse())
}

fn headers(path: &mut PathBuf) -> Vec<(&mut PathBuf, Needs)> {
    vec![(path, Needs::Headers)]
}

fn whole(path: &mut PathBuf) -> Vec<(&mut PathBuf, Needs)> {
    vec![(path, Needs::Whole)]
}

fn with_base<'a>(path: &'a mut PathBuf, base: &'a mut Option<PathBuf>) -> Vec<(&'a mut PathBuf, Needs)> {
    whole(path).into_iter().chain(base.as_mut().map(whole).unwrap_or_default()).collect()
}

/// The checkpoints that a verb reads.
fn checkpoints(command: &mut Command) -> Vec<(&mut PathBuf, Needs)> {
    match command {
        Command::Inspect(args) => match args.entropy {
            true => whole(&mut args.dir),
            false => headers(&mut args.dir),
        },
        Command::Plan(args) => {
            let base = args.recipe.base.as_mut().map(whole).unwrap_or_default();
            headers(&mut args.dir).into_iter().chain(base).collect()
        }
        Command::Doctor(args) => args.model.as_mut().map(headers).unwrap_or_default(),
        Command::Convert(args) => with_base(&mut args.dir, &mut args.recipe.base),
        Command::Rank(args) => whole(&mut args.dir),
        Command::Export(args) => whole(&mut args.dir),
        Command::Restore(args) => with_base(&mut args.dir, &mut args.base),
        Command::Verify(args) => {
            let against = args.against.as_mut().map(whole).unwrap_or_default();
            with_base(&mut args.dir, &mut args.base).into_iter().chain(against).collect()
        }
        Command::Diff(args) => [&mut args.a, &mut args.b].into_iter().flat_map(whole).collect(),
        Command::Eval(EvalCommand::Ppl(args)) => whole(&mut args.model),
        Command::Eval(EvalCommand::Kld(args)) => {
            [&mut args.model, &mut args.base].into_iter().flat_map(whole).collect()
        }
        Command::Eval(EvalCommand::Tasks(args)) => {
            [Some(&mut args.model), args.base.as_mut()].into_iter().flatten().flat_map(whole).collect()
        }
        Command::Generate(args) => whole(&mut args.model),
        Command::Speed(args) => args.models.iter_mut().flat_map(whole).collect(),
        Command::Bench(args) => match &mut args.command {
            None => args.dir.as_mut().map(whole).unwrap_or_default(),
            Some(BenchCommand::Gpu(args)) => args.model.as_mut().map(whole).unwrap_or_default(),
            Some(BenchCommand::Kernels(args)) => args.model.as_mut().map(whole).unwrap_or_default(),
            Some(_) => Vec::new(),
        },
        // What these read stands in their plan.
        Command::Worker(_) | Command::Merge(_) => Vec::new(),
        Command::Completions(_) | Command::Man(_) | Command::RenderChatTemplate => Vec::new(),
    }
}

/// A bar that begins when it is known how much there is.
struct Download<'a> {
    output: Output<'a>,
    bar: OnceLock<Bar<'a>>,
}

impl<'a> Download<'a> {
    fn new(output: Output<'a>) -> Self {
        Self { output, bar: OnceLock::new() }
    }
}

impl Progress for Download<'_> {
    fn total(&self, bytes: u64) {
        self.bar.get_or_init(|| Bar::new("download", bytes, self.output));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = self.bar.get() {
            bar.advance(bytes);
        }
    }

    fn retreat(&self, bytes: u64) {
        if let Some(bar) = self.bar.get() {
            bar.retreat(bytes);
        }
    }
}
