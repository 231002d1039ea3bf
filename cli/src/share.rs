//! Which of many jobs this is: by the arguments, or as the environment of a scheduler says.

use crate::args::WorkerArgs;
use crate::report::Failure;

/// A job among others.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) jobs: usize,
    /// From 0.
    pub(crate) rank: usize,
    /// What says the rank.
    pub(crate) by: &'static str,
}

/// What a scheduler sets.
struct Scheduler {
    rank: &'static str,
    /// The rank of the first job, where that is not 0, and the difference between two.
    counted: Option<(&'static str, &'static str)>,
    jobs: Option<&'static str>,
}

/// In the order in which they are asked.
const SCHEDULERS: [Scheduler; 4] = [
    Scheduler { rank: "JOB_COMPLETION_INDEX", counted: None, jobs: None },
    Scheduler {
        rank: "SLURM_ARRAY_TASK_ID",
        counted: Some(("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")),
        jobs: Some("SLURM_ARRAY_TASK_COUNT"),
    },
    Scheduler { rank: "SKYPILOT_JOB_RANK", counted: None, jobs: Some("SKYPILOT_NUM_JOBS") },
    Scheduler { rank: "SKYPILOT_NODE_RANK", counted: None, jobs: Some("SKYPILOT_NUM_NODES") },
];

/// The job that the arguments, and `variable`s where they do not, say.
///
/// # Errors
/// Nobody says it, or the rank is not below the number of jobs.
pub(crate) fn of(args: &WorkerArgs, variable: &dyn Fn(&str) -> Option<String>) -> Result<Share, Failure> {
    let number = |name: &str| -> Result<Option<usize>, Failure> {
        let Some(text) = variable(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let number = text.parse().map_err(|_| Failure::Usage(format!("{name}={text} is no number")))?;
        Ok(Some(number))
    };
    let (rank, mut jobs, by) = match args.job_rank {
        Some(rank) => (rank, args.num_jobs, "--job-rank"),
        None => found(&number)?.ok_or_else(|| {
            Failure::Usage(
                "say which units: --unit N, or --num-jobs N --job-rank R (no scheduler has set a rank here)"
                    .to_owned(),
            )
        })?,
    };
    jobs = args.num_jobs.or(jobs);
    let Some(jobs) = jobs else {
        return Err(Failure::Usage(format!(
            "{by} says which job this is; say how many there are with --num-jobs"
        )));
    };
    if rank >= jobs {
        return Err(Failure::Usage(format!(
            "{by} says {rank}, and of {jobs} jobs the last is {}: ranks count from 0",
            jobs.saturating_sub(1)
        )));
    }
    Ok(Share { jobs, rank, by })
}

type Found = (usize, Option<usize>, &'static str);

fn found(number: &dyn Fn(&str) -> Result<Option<usize>, Failure>) -> Result<Option<Found>, Failure> {
    for scheduler in &SCHEDULERS {
        let Some(id) = number(scheduler.rank)? else { continue };
        let (first, step) = match scheduler.counted {
            Some((first, step)) => (number(first)?.unwrap_or(0), number(step)?.unwrap_or(1).max(1)),
            None => (0, 1),
        };
        let jobs = scheduler.jobs.map(number).transpose()?.flatten();
        return Ok(Some((id.saturating_sub(first) / step, jobs, scheduler.rank)));
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn share(args: &[&str], environment: &[(&str, &str)]) -> Result<Share, String> {
        let args = [&["llmpress", "worker", "--plan", "p", "OUT"], args].concat();
        let Command::Worker(args) = Cli::try_parse_from(args).map_err(|e| e.to_string())?.command else {
            return Err("no worker".to_owned());
        };
        let variable =
            |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        of(&args, &variable).map_err(|e| match e {
            Failure::Usage(text) => text,
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn each_scheduler_says_which_job_this_is() {
        let is = |jobs, rank, by| Ok(Share { jobs, rank, by });
        assert_eq!(share(&["--num-jobs", "4", "--job-rank", "3"], &[]), is(4, 3, "--job-rank"));
        let pod = [("JOB_COMPLETION_INDEX", "2")];
        assert_eq!(share(&["--num-jobs", "4"], &pod), is(4, 2, "JOB_COMPLETION_INDEX"));
        assert!(share(&[], &pod).unwrap_err().contains("--num-jobs"));
        let task = [
            ("SLURM_ARRAY_TASK_ID", "7"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_STEP", "2"),
            ("SLURM_ARRAY_TASK_COUNT", "4"),
        ];
        assert_eq!(share(&[], &task), is(4, 3, "SLURM_ARRAY_TASK_ID"));
        assert_eq!(share(&["--num-jobs", "9"], &task), is(9, 3, "SLURM_ARRAY_TASK_ID"));
        let job = [("SKYPILOT_NODE_RANK", "0"), ("SKYPILOT_JOB_RANK", "1"), ("SKYPILOT_NUM_JOBS", "3")];
        assert_eq!(share(&[], &job), is(3, 1, "SKYPILOT_JOB_RANK"));
        let node = [("SKYPILOT_NODE_RANK", "1"), ("SKYPILOT_NUM_NODES", "2")];
        assert_eq!(share(&[], &node), is(2, 1, "SKYPILOT_NODE_RANK"));
    }

    #[test]
    fn a_rank_that_nobody_says_or_that_is_too_large_is_wrong_usage() {
        assert!(share(&[], &[]).unwrap_err().contains("say which units"));
        assert!(share(&["--num-jobs", "2", "--job-rank", "2"], &[]).unwrap_err().contains("from 0"));
        assert!(
            share(&["--num-jobs", "2"], &[("JOB_COMPLETION_INDEX", "x")]).unwrap_err().contains("no number")
        );
    }
}
