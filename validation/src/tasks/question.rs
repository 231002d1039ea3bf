//! A set of questions: a JSON object a line.
//!
//! ```text
//! {"context": "...", "choices": ["...", "..."], "answer": 0}      choices count from 0
//! {"text": "...", "target": "..."}
//! ```

use std::path::Path;

use llmpress_formats::{Error, Result, python_json};
use serde::Deserialize;
use serde_json::Value;

/// Most choices of a question.
const MOST_CHOICES: usize = 1 << 10;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Which of several endings is the right one.
    Choice {
        /// What they come after.
        context: String,
        /// The endings.
        choices: Vec<String>,
        /// The right one, from 0 on.
        answer: usize,
    },
    /// Whether the model would go on so.
    Cloze {
        /// What it goes on from.
        text: String,
        /// What comes then.
        target: String,
    },
}

#[derive(Deserialize)]
struct Choice {
    context: String,
    choices: Vec<String>,
    answer: usize,
}

#[derive(Deserialize)]
struct Cloze {
    text: String,
    target: String,
}

impl Question {
    /// Reads a set; empty lines are left out, and members of other names.
    ///
    /// # Errors
    /// A line that is no question, by its number and what is wrong; a set without any.
    pub fn read_all(path: &Path, text: &str) -> Result<Vec<Self>> {
        let mut questions = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let question = Self::read(line);
            questions.push(
                question
                    .map_err(|what| Error::corrupt(path, None, format!("line {}: {what}", number + 1)))?,
            );
        }
        if questions.is_empty() {
            return Err(Error::corrupt(path, None, "holds no question: one JSON object a line is needed"));
        }
        Ok(questions)
    }

    fn read(line: &str) -> Result<Self, String> {
        let value: Value = python_json(line.as_bytes()).map_err(|e| format!("is not valid JSON: {e}"))?;
        let has = |name: &str| value.get(name).is_some();
        if has("choices") {
            let Choice { context, choices, answer } =
                Choice::deserialize(&value).map_err(|e| format!("context, choices, answer: {e}"))?;
            if !(2..=MOST_CHOICES).contains(&choices.len()) {
                return Err(format!("has {} choices: 2 to {MOST_CHOICES} are needed", choices.len()));
            }
            if let Some(empty) = choices.iter().position(|choice| choice.trim().is_empty()) {
                return Err(format!("choice {empty} is empty"));
            }
            if answer >= choices.len() {
                return Err(format!(
                    "answer {answer} is none of {} choices, which count from 0",
                    choices.len()
                ));
            }
            return Ok(Self::Choice { context, choices, answer });
        }
        if has("target") {
            let Cloze { text, target } =
                Cloze::deserialize(&value).map_err(|e| format!("text, target: {e}"))?;
            if target.trim().is_empty() {
                return Err("its target is empty".to_owned());
            }
            return Ok(Self::Cloze { text, target });
        }
        Err("is no question: it has neither `choices` (with `context` and `answer`) nor `target` (with `text`)".to_owned())
    }

    /// How many endings a model is asked for.
    pub fn count(&self) -> usize {
        match self {
            Self::Choice { choices, .. } => choices.len(),
            Self::Cloze { .. } => 1,
        }
    }

    /// Contexts and endings, whose concatenation is what the model reads. Spaces at the end of a context belong to the ending,
    /// and where there are none a space stands before it.
    pub(super) fn endings(&self) -> Vec<(&str, String)> {
        let one = |context: &str, ending: &str| {
            let kept = context.trim_end();
            let spaces = &context[kept.len()..];
            let spaced = !spaces.is_empty() || context.is_empty() || ending.starts_with(char::is_whitespace);
            (kept.len(), format!("{}{ending}", if spaced { spaces } else { " " }))
        };
        match self {
            Self::Choice { context, choices, .. } => {
                let each = choices.iter().map(|choice| one(context, choice));
                each.map(|(kept, ending)| (&context[..kept], ending)).collect()
            }
            Self::Cloze { text, target } => {
                let (kept, ending) = one(text, target);
                vec![(&text[..kept], ending)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Vec<Question>> {
        Question::read_all(Path::new("set.jsonl"), line)
    }

    #[test]
    fn lines_that_are_no_question_are_refused_by_number() {
        for (line, says) in [
            ("", "holds no question"),
            ("\n[]", "line 2: is no question"),
            ("{\"context\": \"a\"}", "neither `choices`"),
            ("{", "line 1: is not valid JSON"),
            (r#"{"choices": ["a", "b"], "answer": 0}"#, "missing field `context`"),
            (r#"{"context": "x", "choices": ["a"], "answer": 0}"#, "has 1 choices"),
            (r#"{"context": "x", "choices": ["a", " "], "answer": 0}"#, "choice 1 is empty"),
            (r#"{"context": "x", "choices": ["a", "b"], "answer": 2}"#, "answer 2 is none of 2"),
            (r#"{"context": "x", "choices": ["a", "b"], "answer": -1}"#, "answer"),
            (r#"{"text": "x", "target": ""}"#, "target is empty"),
            (r#"{"target": "x"}"#, "missing field `text`"),
        ] {
            let error = read(line).unwrap_err().to_string();
            assert!(error.contains("set.jsonl") && error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn an_ending_stands_after_one_space_unless_the_text_says_otherwise() {
        let endings = |context: &str, ending: &str| {
            let question = Question::Cloze { text: context.to_owned(), target: ending.to_owned() };
            let [(context, ending)] = &question.endings()[..] else { panic!("one ending") };
            (context.to_string(), ending.clone())
        };
        let of = |context: &str, ending: &str| (context.to_owned(), ending.to_owned());
        assert_eq!(endings("It is", "true"), of("It is", " true"));
        assert_eq!(endings("It is ", "true"), of("It is", " true"));
        assert_eq!(endings("It is\n\n", "true"), of("It is", "\n\ntrue"));
        assert_eq!(endings("It is", "\ntrue"), of("It is", "\ntrue"));
        assert_eq!(endings("", "true"), of("", "true"));
    }

    #[test]
    fn sets_may_mix_kinds_and_have_members_of_their_own() {
        let text = "{\"context\": \"x\", \"choices\": [\"a\", \"b\"], \"answer\": 1, \"id\": 7}\n\n{\"text\": \"t\", \"target\": \"u\"}\n";
        let questions = read(text).unwrap();
        assert!(matches!(&questions[..], [Question::Choice { answer: 1, .. }, Question::Cloze { .. }]));
    }
}
