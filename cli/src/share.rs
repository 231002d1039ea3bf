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

/// Rank, jobs and what says it.
type Found = (usize, Option<usize>, &'static str);
type Number<'a> = &'a dyn Fn(&str) -> Result<Option<usize>, Failure>;

/// What schedulers set, in the order in which they are asked.
fn found(number: Number<'_>) -> Result<Option<Found>, Failure> {
    for scheduler in [kubernetes, slurm, skypilot] {
        if let Some(found) = scheduler(number)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// An Indexed Job, which does not tell its pods how many they are.
fn kubernetes(number: Number<'_>) -> Result<Option<Found>, Failure> {
    const INDEX: &str = "JOB_COMPLETION_INDEX";
    Ok(number(INDEX)?.map(|rank| (rank, None, INDEX)))
}

/// A task of an array, which may begin anywhere and leave some out.
fn slurm(number: Number<'_>) -> Result<Option<Found>, Failure> {
    const ID: &str = "SLURM_ARRAY_TASK_ID";
    let Some(id) = number(ID)? else { return Ok(None) };
    let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
    let step = number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
    Ok(Some((id.saturating_sub(first) / step, number("SLURM_ARRAY_TASK_COUNT")?, ID)))
}

/// A node of a job, of which a pool runs several: a job that has no others is of rank 0, whatever is said of their number.
fn skypilot(number: Number<'_>) -> Result<Option<Found>, Failure> {
    const JOB: &str = "SKYPILOT_JOB_RANK";
    const NODE: &str = "SKYPILOT_NODE_RANK";
    let (job, node) = (number(JOB)?, number(NODE)?);
    let by = match (job, node) {
        (None, None) => return Ok(None),
        (None | Some(0), Some(_)) => NODE,
        (Some(_), _) => JOB,
    };
    let (job, node) = (job.unwrap_or(0), node.unwrap_or(0));
    let nodes = number("SKYPILOT_NUM_NODES")?.unwrap_or(1).max(1);
    let jobs = number("SKYPILOT_NUM_JOBS").ok().flatten().or((job == 0).then_some(1));
    Ok(Some((
        job.saturating_mul(nodes).saturating_add(node),
        jobs.map(|jobs| jobs.saturating_mul(nodes)),
        by,
    )))
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
        let alone = [("SKYPILOT_JOB_RANK", "0"), ("SKYPILOT_NUM_JOBS", "None")];
        assert_eq!(share(&[], &[&node[..], &alone].concat()), is(2, 1, "SKYPILOT_NODE_RANK"));
        let both = [("SKYPILOT_JOB_RANK", "2"), ("SKYPILOT_NUM_JOBS", "3")];
        assert_eq!(share(&[], &[&node[..], &both].concat()), is(6, 5, "SKYPILOT_JOB_RANK"));
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
