//! `sweep-now`: asks the operator for one sweep, by an annotation with a new value, and waits for its answer if told to.

use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::cluster::{self, Cluster, ClusterArgs, ClusterError};
use super::status::{ObjectView, count, plain};
use super::{Output, note, refuse, respond, show};
use crate::api::Reason;
use crate::api::condition::{self, Condition, ConditionType};
use crate::api::request::REQUESTED_AT;
use crate::api::status::Outcome;
use crate::api::{self, AuditLogSweeperStatus};

/// How often the answer is looked for.
const LOOK: Duration = Duration::from_millis(500);

/// How often it is said that there is none yet.
const TELL: Duration = Duration::from_secs(5);

/// A sweep may take its deadline; before and after it, the operator may be busy for this long.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct SweepNow {
    /// AuditLogSweeper
    #[arg(value_parser = cluster::name)]
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Wait for the end of the sweep: exit with 0 if it went well, 1 if not
    #[arg(long)]
    wait: bool,
    /// How long to wait, such as 90s [default: spec.deadline and 30s]
    #[arg(long, requires = "wait")]
    timeout: Option<api::Duration>,
    /// How the result is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Answer {
    /// Asked for; nobody waits.
    Requested,
    Swept,
    Failed,
    /// The operator ended in the middle; the next goes on.
    Stopped,
    /// Answered by an event alone.
    Suspended,
    /// Not within the time.
    None,
}

impl Answer {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "Requested",
            Self::Swept => "Swept",
            Self::Failed => "Failed",
            Self::Stopped => "Stopped",
            Self::Suspended => "Suspended",
            Self::None => "NoAnswer",
        }
    }

    const fn exit_code(self) -> u8 {
        match self {
            Self::Requested | Self::Swept => 0,
            Self::Failed | Self::Stopped | Self::Suspended | Self::None => 1,
        }
    }
}

/// Asks for a sweep.
pub async fn sweep_now(args: SweepNow) -> ExitCode {
    let token = token(Utc::now());
    let (seen, answer) = match request(&args, &token).await {
        Ok(answered) => answered,
        Err(error) => return refuse(&error),
    };
    let written = match args.output {
        Output::Text => show(&sentence(&seen, answer)),
        output => respond(output, &report(&seen, &token, answer)),
    };
    match answer.exit_code() {
        0 => written,
        code => ExitCode::from(code),
    }
}

/// A value that no request had before.
fn token(now: DateTime<Utc>) -> String {
    format!("{}-{:08x}", now.to_rfc3339_opts(SecondsFormat::Secs, true), fastrand::u32(..))
}

async fn request(args: &SweepNow, token: &str) -> Result<(ObjectView, Answer), ClusterError> {
    let cluster = Cluster::connect(&args.cluster).await?;
    let patch = json!({ "metadata": { "annotations": { REQUESTED_AT: token } } });
    let seen = ObjectView::from(&cluster.patch(&args.name, &patch).await?);
    if !args.wait {
        let answer = if seen.suspend() { Answer::Suspended } else { Answer::Requested };
        return Ok((seen, answer));
    }
    let deadline = seen.spec.as_ref().map_or(Duration::ZERO, |spec| spec.deadline.as_std());
    let wait_timeout = args.timeout.map_or(deadline + GRACE, api::Duration::as_std);
    note(&format!("asked for a sweep of {} in namespace {}", seen.name, seen.namespace));
    wait(&cluster, &args.name, token, wait_timeout).await
}

/// Looks until there is an answer, and tells now and then that there is none.
async fn wait(
    cluster: &Cluster,
    name: &str,
    token: &str,
    wait_timeout: Duration,
) -> Result<(ObjectView, Answer), ClusterError> {
    let began = Instant::now();
    let mut told = Duration::ZERO;
    loop {
        let looked = cluster.get(name).await.map(|object| ObjectView::from(&object));
        if let Ok(seen) = &looked
            && let Some(answer) = answer(token, seen)
        {
            return looked.map(|seen| (seen, answer));
        }
        let waited = began.elapsed();
        let looked = match looked {
            Err(ClusterError::NoObject { name, namespace, .. }) => return Err(ClusterError::Gone { name, namespace }),
            // It may be there again before the time is up, and the sweep goes on without us.
            Err(error) if !error.may_pass() => return Err(error),
            looked => looked,
        };
        if waited >= wait_timeout {
            return looked.map(|seen| (seen, Answer::None));
        }
        if waited - told >= TELL {
            told = waited;
            let who = if looked.is_ok() { "operator" } else { "API server" };
            note(&format!("waiting for the {who}, {} s of at most {} s", waited.as_secs(), wait_timeout.as_secs()));
        }
        sleep(LOOK.min(wait_timeout - waited)).await;
    }
}

/// What the status says of a request; None: nothing yet. Of requests that come faster than sweeps end the last one is
/// answered, and its answer is that of all before it.
fn answer(token: &str, seen: &ObjectView) -> Option<Answer> {
    let status: &AuditLogSweeperStatus = &seen.status;
    let handled = status.last_handled_request.as_deref()?;
    let newest = seen.requested.as_deref().map(|requested| api::cut(requested, 128));
    if handled != token && Some(handled) != newest {
        return None;
    }
    if condition::is_true(&status.conditions, ConditionType::Suspended) {
        return Some(Answer::Suspended);
    }
    Some(match status.last_sweep.as_ref().map(|last| last.outcome) {
        None | Some(Outcome::Failed) => Answer::Failed,
        Some(Outcome::Stopped) => Answer::Stopped,
        Some(Outcome::Drained | Outcome::LimitReached | Outcome::DeadlineReached | Outcome::Observed) => Answer::Swept,
    })
}

fn sentence(seen: &ObjectView, answer: Answer) -> String {
    let ObjectView { namespace, name, status, .. } = seen;
    let at = format!("{name} in namespace {namespace}");
    match answer {
        Answer::Requested => format!("asked for a sweep of {at}; see it with `status {name} -n {namespace}`"),
        Answer::Swept => {
            // After an edit it is about something else.
            let about_sweep = |ready: &&Condition| ready.reason != Reason::SchemaReady.as_str();
            let ready = condition::find(&status.conditions, ConditionType::Ready).filter(about_sweep);
            let rows = status.last_sweep.as_ref().map_or(0, |last| last.timed_out);
            let said = ready
                .map_or_else(|| format!("{} timed out", count(rows, "row", "rows")), |ready| plain(&ready.message));
            format!("swept {at}: {said}")
        }
        Answer::Failed => {
            let error = status.last_error.as_ref();
            let said = error.map(|error| format!("{}: {}", plain(&error.reason), plain(&error.message)));
            let advice = error.and_then(|error| super::status::advice(&error.reason, &error.message));
            let advice = advice.map_or_else(String::new, |advice| format!("\nDo: {advice}"));
            format!("the sweep of {at} failed: {}{advice}", said.as_deref().unwrap_or("the status does not say why"))
        }
        Answer::Stopped => {
            format!("the sweep of {at} was stopped with its operator; the next operator goes on with it")
        }
        Answer::Suspended => format!(
            "{at} is suspended: the request is recorded and answered by an event, and no sweep runs, now or on resume; \
             `resume {name} -n {namespace}` first"
        ),
        Answer::None => format!(
            "no operator answered for {at} in time; the request stays, and is answered by the operator that comes. Look \
             at `status {name} -n {namespace}`, whether a pod runs: `kubectl get pods -A -l \
             app.kubernetes.io/name=audit-log-sweeper`, and whether it watches this namespace"
        ),
    }
}

fn report(seen: &ObjectView, token: &str, answer: Answer) -> Value {
    let ended = matches!(answer, Answer::Swept | Answer::Failed | Answer::Stopped);
    json!({
        "namespace": seen.namespace,
        "name": seen.name,
        "requestedAt": token,
        "answer": answer.as_str(),
        "lastSweep": seen.status.last_sweep.as_ref().filter(|_| ended),
        "backlog": seen.status.backlog.as_ref().filter(|_| answer == Answer::Swept),
        "error": seen.status.last_error.as_ref().filter(|_| answer == Answer::Failed),
    })
}
