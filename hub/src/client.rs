//! Asking a hub, more than once where that may help.

use std::io::Read;
use std::time::Duration;

use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};

use crate::{Error, Result, Settings};

/// How often something is asked for again in a row before anything has arrived.
const TRIES: u32 = 6;
/// Likewise a listing, where a name may just be a path that was mistyped and nobody answers.
const FEW_TRIES: u32 = 3;
/// What is waited at most before a try.
const LONGEST: Duration = Duration::from_secs(60);
/// A connection that says nothing for so long is lost.
const SILENCE: Duration = Duration::from_secs(60);

/// Asks one hub.
pub(crate) struct Client {
    agent: Agent,
    settings: Settings,
}

/// An answer that may be read.
pub(crate) type Answer = Response<ureq::Body>;

/// Why a try failed, and whether another one may help.
pub(crate) enum Failed {
    /// After a while.
    Soon {
        why: String,
        wait: Option<Duration>,
    },
    Never(Error),
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("llmpress/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        Self { agent: config.into(), settings }
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Asks once: for the bytes from `from` on, up to the one before `to` where that is said.
    pub(crate) fn ask(&self, url: &str, from: u64, to: Option<u64>) -> Result<Answer, Failed> {
        let mut request = self.agent.get(url).header("Accept-Encoding", "identity");
        if from > 0 || to.is_some() {
            let last = to.map_or(String::new(), |to| to.saturating_sub(1).to_string());
            request = request.header("Range", format!("bytes={from}-{last}"));
        }
        if let Some(token) = &self.settings.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let answer = request.call().map_err(|e| failed(url, e))?;
        self.sort(url, answer)
    }

    /// Takes what a status means.
    fn sort(&self, url: &str, answer: Answer) -> Result<Answer, Failed> {
        let status = answer.status();
        if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE)
        {
            return Ok(answer);
        }
        if status == StatusCode::TOO_MANY_REQUESTS
            || status.is_server_error()
            || status == StatusCode::REQUEST_TIMEOUT
        {
            let wait = text(answer.headers(), "retry-after").and_then(|seconds| seconds.parse().ok());
            let why = format!("the hub answers {status}");
            return Err(Failed::Soon { why, wait: wait.map(Duration::from_secs) });
        }
        let what = match (status.as_u16(), &self.settings.token) {
            (401 | 403, None) => {
                "it is gated, private, or not there: accept its licence on its page and set HF_TOKEN"
                    .to_owned()
            }
            (401 | 403, Some(_)) => {
                "the token in use may not read it: accept the licence on its page, or take another token"
                    .to_owned()
            }
            (404, _) => "there is no such checkpoint, revision or file: mind capitals".to_owned(),
            _ => "that was not asked for: is HF_ENDPOINT a hub's address?".to_owned(),
        };
        let (url, status) = (url.to_owned(), status.as_u16());
        Err(Failed::Never(Error::Refused { url, status, what }))
    }

    /// Asks until `once` has an answer, or there is no hope left. `once` says whether anything came of a try that failed.
    pub(crate) fn persist<T>(&self, url: &str, once: impl FnMut() -> Result<T, (Failed, bool)>) -> Result<T> {
        self.try_so_often(TRIES, url, once)
    }

    fn try_so_often<T>(
        &self,
        most: u32,
        url: &str,
        mut once: impl FnMut() -> Result<T, (Failed, bool)>,
    ) -> Result<T> {
        let mut tries = 0;
        loop {
            let (why, wait) = match once() {
                Ok(value) => return Ok(value),
                Err((Failed::Never(error), _)) => return Err(error),
                Err((Failed::Soon { why, wait }, something)) => {
                    if something {
                        tries = 0;
                    }
                    (why, wait)
                }
            };
            tries += 1;
            if tries >= most {
                return Err(Error::Unreachable { url: url.to_owned(), why });
            }
            let doubled = self.settings.patience.saturating_mul(1 << (tries - 1));
            std::thread::sleep(wait.unwrap_or(doubled).min(LONGEST));
        }
    }

    /// A small document.
    pub(crate) fn small(&self, url: &str, most: u64) -> Result<Vec<u8>> {
        self.try_so_often(FEW_TRIES, url, || {
            let answer = self.ask(url, 0, None).map_err(|e| (e, false))?;
            let mut bytes = Vec::new();
            let mut reader = answer.into_body().into_reader().take(most + 1);
            reader.read_to_end(&mut bytes).map_err(|e| (soon(&e), false))?;
            if bytes.len() as u64 > most {
                let what = format!("answers with more than {most} bytes");
                return Err((Failed::Never(Error::Corrupt { url: url.to_owned(), what }), false));
            }
            Ok(bytes)
        })
    }

    /// The size of a file and what names its content, by its headers.
    pub(crate) fn describe(&self, url: &str) -> Result<(u64, String)> {
        let head = || {
            let mut request = self.agent.head(url).header("Accept-Encoding", "identity");
            if let Some(token) = &self.settings.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            // What the hub itself says of a file comes before it sends one on to where the file lies.
            let request = request.config().max_redirects(0).max_redirects_will_error(false).build();
            let answer = request.call().map_err(|e| failed(url, e))?;
            if answer.status().is_redirection() { Ok(answer) } else { self.sort(url, answer) }
        };
        let headers = self.persist(url, || head().map_err(|e| (e, false)))?.headers().clone();
        let etag = text(&headers, "x-linked-etag").or_else(|| text(&headers, "etag"));
        let bytes = text(&headers, "x-linked-size").or_else(|| text(&headers, "content-length"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        bytes.and_then(|bytes| bytes.parse().ok()).zip(etag).ok_or_else(|| Error::Corrupt {
            url: url.to_owned(),
            what: "the hub says neither how large it is nor what is in it: take another mirror".to_owned(),
        })
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Where the bytes of an answer begin; none where it says so wrongly.
pub(crate) fn begins_at(answer: &Answer) -> Option<u64> {
    if answer.status() == StatusCode::OK {
        return Some(0);
    }
    let range = text(answer.headers(), "content-range")?.strip_prefix("bytes ")?;
    range.split_once('-')?.0.trim().parse().ok()
}

fn failed(url: &str, error: ureq::Error) -> Failed {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
            Failed::Never(Error::Invalid(format!("{url}: {error}")))
        }
        other => Failed::Soon { why: other.to_string(), wait: None },
    }
}

/// A connection that broke.
pub(crate) fn soon(error: &std::io::Error) -> Failed {
    Failed::Soon { why: error.to_string(), wait: None }
}
