//! The progress bar: one for the whole job, on a terminal; plain lines otherwise.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use llmpress_formats::printable;
use llmpress_pipeline::{Counted, Evaluated, Learned, Lesson, Progress, Task, Taught, Watch};

use crate::call::Listener;
use crate::report::{Output, note};

/// How often a line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

fn template(counted: Counted) -> &'static str {
    match counted {
        Counted::Bytes => "{msg} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        Counted::Windows => "{msg} {wide_bar} {pos}/{len} windows  {per_sec}  {eta} left",
        Counted::Passes => "{msg} {wide_bar} {pos}/{len} passes  {per_sec}  {eta} left",
        Counted::Prompts => "{msg} {wide_bar} {pos}/{len} prompts  {elapsed}",
        Counted::Endings => "{msg} {wide_bar} {pos}/{len} endings  {per_sec}  {eta} left",
        Counted::Tokens => "{msg} {wide_bar} {human_pos}/{human_len} tokens  {per_sec}  {eta} left",
        Counted::Weights => "{msg} {wide_bar} {human_pos}/{human_len} weights  {eta} left",
    }
}

fn amount(n: u64, counted: Counted) -> String {
    match counted {
        Counted::Bytes => crate::report::bytes(n),
        Counted::Windows => format!("{n} windows"),
        Counted::Passes => format!("{n} passes"),
        Counted::Prompts => format!("{n} prompts"),
        Counted::Endings => format!("{n} endings"),
        Counted::Weights => format!("{n} weights"),
        Counted::Tokens => format!("{n} tokens"),
    }
}

/// What is counted, for a listener.
fn unit(counted: Counted) -> &'static str {
    match counted {
        Counted::Bytes => "bytes",
        Counted::Windows => "windows",
        Counted::Passes => "passes",
        Counted::Prompts => "prompts",
        Counted::Endings => "endings",
        Counted::Weights => "weights",
        Counted::Tokens => "tokens",
    }
}

/// Bars for the parts of a job, one after the other.
pub(crate) struct Bars<'a>(pub(crate) Output<'a>);

impl Watch for Bars<'_> {
    fn begin(&self, task: Task) -> Box<dyn Progress + '_> {
        if task.counted == Counted::Tokens && self.0.listener.is_none() {
            crate::interrupt::install();
        }
        Box::new(Bar::of(task.verb, task.size, task.counted, self.0))
    }

    fn is_stopped(&self) -> bool {
        self.0.listener.map_or_else(crate::interrupt::is_asked, Listener::is_stopped)
    }
}

/// Shows the progress of a job over so many bytes of tensors or windows of a text, whose work may be counted
/// pass by pass.
pub(crate) struct Bar<'a> {
    verb: &'static str,
    size: u64,
    counted: Counted,
    lines: bool,
    json: bool,
    listener: Option<&'a dyn Listener>,
    start: Instant,
    bar: OnceLock<ProgressBar>,
    total: AtomicU64,
    done: AtomicU64,
    /// Done by earlier runs.
    before: AtomicU64,
    next_line: AtomicU64,
}

impl<'a> Bar<'a> {
    pub(crate) fn new(verb: &'static str, source_bytes: u64, output: Output<'a>) -> Self {
        Self::of(verb, source_bytes, Counted::Bytes, output)
    }

    pub(crate) fn of(verb: &'static str, size: u64, counted: Counted, output: Output<'a>) -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let show = !output.quiet && !output.json && output.listener.is_none();
        if let Some(listener) = output.listener {
            listener.begin(verb, size, unit(counted));
        }
        let bar = OnceLock::new();
        if show && terminal {
            let progress = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr_with_hz(8));
            if let Ok(style) = ProgressStyle::with_template(template(counted)) {
                progress.set_style(style);
            }
            progress.set_message(verb);
            bar.get_or_init(|| progress);
        }
        Self {
            verb,
            size,
            counted,
            lines: show && !terminal,
            json: output.json && !output.quiet && output.listener.is_none(),
            listener: output.listener,
            start: Instant::now(),
            bar,
            total: AtomicU64::new(size),
            done: AtomicU64::new(0),
            before: AtomicU64::new(0),
            next_line: AtomicU64::new(LINE_EVERY.as_secs()),
        }
    }

    /// Clears the bar; returns the seconds the job took.
    pub(crate) fn finish(&self) -> f64 {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
        self.start.elapsed().as_secs_f64()
    }

    /// So much of what was done has to be done again.
    pub(crate) fn retreat(&self, amount: u64) {
        let _ = self
            .done
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |done| Some(done.saturating_sub(amount)));
    }

    /// Work done, as a part of the size.
    fn position(&self) -> u64 {
        let total = self.total.load(Ordering::Relaxed).max(1);
        let done = self.done.load(Ordering::Relaxed).min(total);
        (u128::from(done) * u128::from(self.size) / u128::from(total)) as u64
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        if self.counted == Counted::Tokens && self.listener.is_none() {
            crate::interrupt::remove();
        }
        self.finish();
    }
}

impl Progress for Bar<'_> {
    fn start(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if let Some(listener) = self.listener {
            listener.advance(self.position());
            // What trains asks by itself, after its step, and keeps a state.
            if self.counted != Counted::Tokens && listener.is_stopped() {
                crate::call::stop();
            }
        }
        if let Some(bar) = self.bar.get() {
            bar.set_position(self.position());
        } else if self.lines {
            let now = self.start.elapsed().as_secs();
            let due = self.next_line.load(Ordering::Relaxed);
            let next = now + LINE_EVERY.as_secs();
            let mine = now >= due
                && self.next_line.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if mine {
                let share = self.position() as f64 / self.size.max(1) as f64;
                // What was done before this run took none of its time.
                let seconds = self.start.elapsed().as_secs_f64();
                let total = self.total.load(Ordering::Relaxed).max(1);
                let before = self.before.load(Ordering::Relaxed) as f64 / total as f64;
                let left = seconds * (1.0 - share) / (share - before).max(1e-6);
                let rate = match self.counted {
                    Counted::Tokens => {
                        format!(", {:.0} tokens/s", (share - before) * self.size as f64 / seconds.max(1e-9))
                    }
                    _ => String::new(),
                };
                note(&format!(
                    "{}: {:.0} % of {}{rate}, {left:.0} s left",
                    self.verb,
                    share * 100.0,
                    amount(self.size, self.counted)
                ));
            }
        }
    }

    fn resumed(&self, amount: u64) {
        self.before.store(amount, Ordering::Relaxed);
        if let Some(bar) = self.bar.get() {
            bar.reset_eta();
        }
        self.advance(amount);
    }

    fn shard(&self, file: &str) {
        if let Some(bar) = self.bar.get() {
            bar.set_message(format!("{} {file}", self.verb));
        } else if self.lines {
            note(&format!("{}: {file} is complete", self.verb));
        }
    }

    fn learned(&self, lesson: &Lesson, layers: usize) {
        if let Some(bar) = self.bar.get() {
            bar.set_message(format!("{} {}", self.verb, told(lesson, layers)));
        } else if self.lines {
            note(&format!("{}: {}", self.verb, told(lesson, layers)));
        } else if self.json {
            let done = self.position() as f64 / self.size.max(1) as f64;
            note(&serde_json::json!({"learned": lesson, "layers": layers, "done": done}).to_string());
        }
    }

    fn evaluated(&self, found: &Evaluated) {
        let told = format!(
            "step {}: perplexity {:.3} (dense {:.3}), KL {:.4}",
            found.step, found.perplexity, found.dense, found.divergence
        );
        if let Some(bar) = self.bar.get() {
            bar.set_message(format!("{} {told}", self.verb));
        } else if self.lines {
            note(&format!("{}: {told}", self.verb));
        } else if self.json {
            let done = self.position() as f64 / self.size.max(1) as f64;
            note(&serde_json::json!({"evaluated": found, "done": done}).to_string());
        }
    }
}

/// What learning came to, in words.
fn told(lesson: &Lesson, layers: usize) -> String {
    let what = match lesson.what {
        Taught::Attention | Taught::Mlp | Taught::Block => lesson.what.name().into(),
        Taught::Matrix => printable(lesson.tensors.first().map_or(lesson.what.name(), String::as_str)),
    };
    let number = |loss: Option<f64>| match loss.filter(|loss| loss.is_finite()) {
        Some(loss) => format!("{loss:.5}"),
        None => "NaN".to_owned(),
    };
    let Learned { before, after, taken } = lesson.learned;
    let kept = if taken { "" } else { ": no better, its start stays" };
    let (layer, before, after) = (lesson.layer + 1, number(Some(before)), number(after));
    format!("layer {layer} of {layers}: {what}: loss {before} -> {after}{kept}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_before_and_after_is_told_with_its_layer_and_what_was_no_better_said() {
        let lesson = |what, after: Option<f64>| Lesson {
            layer: 2,
            what,
            tensors: vec!["experts.3.up\u{1b}.weight".to_owned()],
            relative_errors: vec![None],
            steps: 9,
            learned: Learned { before: 0.25, after, taken: after == Some(0.125) },
        };
        assert_eq!(told(&lesson(Taught::Mlp, Some(0.125)), 8), "layer 3 of 8: MLP: loss 0.25000 -> 0.12500");
        let text = told(&lesson(Taught::Matrix, None), 8);
        assert!(text.contains("experts.3.up") && !text.contains('\u{1b}'), "{text}");
        assert!(text.ends_with("loss 0.25000 -> NaN: no better, its start stays"), "{text}");
    }
}
