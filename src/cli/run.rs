//! `audit-log-sweeper run`: the operator, from its flags to its end.

mod tasks;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgAction, Args};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio_util::sync::CancellationToken;

use super::cluster::choose_proxy;
use super::names::{label, label_or_empty, subdomain};
use super::{default_roots, stop_signal};
use crate::api;
use crate::controller::leader::{self, Leadership, LeaseSettings};
use crate::controller::{self, Clients, Settings};
use crate::schedule::hash;
use crate::telemetry::http::{self, Readiness};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::{LogFormat, LogLevel, log_panics, start_logs};
use tasks::Tasks;

#[derive(Debug, Args)]
pub struct Run {
    /// Work in this namespace only; may be given several times [default: all namespaces]
    #[arg(long = "namespace", value_name = "NAMESPACE", value_parser = label)]
    namespaces: Vec<String>,
    /// Kubeconfig file [default: KUBECONFIG, or else the pod's service account; never ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Work on objects with these labels only, such as shard=a: several installs may share a cluster
    #[arg(long)]
    selector: Option<String>,
    /// Where to serve /healthz, /readyz and /metrics; [::] is all addresses, of IPv4 too
    #[arg(long, default_value = "[::]:8080")]
    health_address: SocketAddr,
    /// The most sweeps at once, and as many checks after an edit. One namespace gets at most half of what the others leave
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(u16).range(1..))]
    max_concurrent_sweeps: u16,
    /// The most sweeps at once on one database server, shared in the same way
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u16).range(1..))]
    max_sweeps_per_server: u16,
    /// The longest that one sweep may take: a longer spec.deadline or spec.statementTimeout counts as this
    #[arg(long, default_value = "1h", value_parser = max_deadline)]
    max_deadline: Duration,
    /// Show series of each object in /metrics. Without, only those of the process
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true",
        require_equals = true)]
    object_metrics: bool,
    /// Work only while this replica holds the lease. Without it, never run two
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true",
        require_equals = true)]
    leader_elect: bool,
    /// The namespace of the lease [default: that of the pod, else the first --namespace, else that of the kubeconfig]
    #[arg(long, env = "POD_NAMESPACE", hide_env_values = true, value_parser = label_or_empty)]
    lease_namespace: Option<String>,
    /// The name of the lease, the same for all replicas of an install [default: audit-log-sweeper, and what tells
    /// --namespace and --selector apart]
    #[arg(long, value_parser = subdomain)]
    lease_name: Option<String>,
    /// How long the others wait before they take over from a replica that died; in whole seconds, at least 1s
    #[arg(long, default_value = "15s", value_parser = lease_duration)]
    lease_duration: Duration,
    /// What the replica is called in the lease
    #[arg(long, env = "POD_NAME", hide = true)]
    pod_name: Option<String>,
    /// What tells the pod from a later one of its name: its containers take the lease over from each other at once
    #[arg(long, env = "POD_UID", hide = true)]
    pod_uid: Option<String>,
    /// How log lines look
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
    /// The least severe log lines that are written
    #[arg(long, value_enum, default_value = "info")]
    log_level: LogLevel,
}

fn duration(text: &str) -> Result<Duration, String> {
    text.parse::<api::Duration>().map(|duration| duration.as_std()).map_err(|error| error.to_string())
}

/// A deadline has the bounds that it has in a spec.
fn max_deadline(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    let fits = duration >= Duration::from_secs(1) && duration <= Duration::from_hours(24);
    if fits { Ok(duration) } else { Err("must be from 1s to 24h".into()) }
}

/// A Lease counts in whole seconds.
fn lease_duration(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    let seconds = Duration::from_secs(duration.as_secs());
    let fits = seconds == duration && seconds >= Duration::from_secs(1) && seconds <= leader::LONGEST;
    if fits { Ok(duration) } else { Err("must be whole seconds, from 1s to 1h".into()) }
}

impl Run {
    /// The same in one form: each namespace once, and a selector that selects all is none.
    fn tidy(mut self) -> Self {
        let mut seen = HashSet::new();
        self.namespaces.retain(|namespace| seen.insert(namespace.clone()));
        self.selector = self.selector.filter(|selector| !selector.trim().is_empty());
        self
    }

    /// Which lease, and who we are.
    fn lease(&self, client: &kube::Client) -> LeaseSettings {
        let namespace = self.lease_namespace.clone().filter(|namespace| !namespace.is_empty());
        let namespace = namespace.or_else(|| self.namespaces.first().cloned());
        let pod = self.pod_name.clone().or_else(|| std::env::var("HOSTNAME").ok()).filter(|name| !name.is_empty());
        let name = pod.unwrap_or_else(|| "audit-log-sweeper".into());
        let pod = self.pod_uid.as_deref().filter(|uid| !uid.is_empty()).map(|uid| format!("{name}_{uid}_"));
        let prefix = pod.clone().unwrap_or_else(|| format!("{name}_"));
        LeaseSettings {
            namespace: namespace.unwrap_or_else(|| client.default_namespace().to_owned()),
            name: self.lease_name.clone().unwrap_or_else(|| lease_name(&self.namespaces, self.selector.as_deref())),
            // A pod that was restarted has its old name, and is not who it was.
            identity: format!("{prefix}{:016x}", fastrand::u64(..)),
            pod,
            duration: self.lease_duration,
        }
    }
}

/// The name of the lease of an install: another for other objects, so that neither keeps the other from working.
fn lease_name(namespaces: &[String], selector: Option<&str>) -> String {
    let mut namespaces = namespaces.to_vec();
    namespaces.sort();
    if namespaces.is_empty() && selector.is_none() {
        return "audit-log-sweeper".into();
    }
    let scope = format!("{}/{}", namespaces.join(","), selector.unwrap_or_default());
    format!("audit-log-sweeper-{:016x}", hash(&scope))
}

/// Runs until it is told to stop.
pub async fn run(args: Run) -> ExitCode {
    start_logs(args.log_format, args.log_level);
    log_panics();
    match operate(args.tidy()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The causes between repeat each other.
            let (said, root) = (error.to_string(), error.root_cause().to_string());
            let said = if said == root { said } else { format!("{said}: {root}") };
            tracing::error!(error = said, "the operator ends");
            ExitCode::FAILURE
        }
    }
}

/// The cluster that was named, or the one of the pod. Nobody should manage a cluster that they did not name.
async fn cluster(kubeconfig: Option<&Path>) -> anyhow::Result<Config> {
    let named = kubeconfig.map(Kubeconfig::read_from).or_else(|| Kubeconfig::from_env().transpose()).transpose()?;
    Ok(match named {
        Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?,
        None => Config::incluster()?,
    })
}

async fn operate(args: Run) -> anyhow::Result<()> {
    let (stop, signals) = stop_signal().context("cannot listen for signals")?;
    let default_roots = default_roots()?;
    let no_cluster = "cannot find a cluster: run in a pod, or name a kubeconfig file with --kubeconfig or KUBECONFIG";
    let mut config = cluster(args.kubeconfig.as_deref()).await.context(no_cluster)?;
    choose_proxy(&mut config);
    // The host alone: a kubeconfig may hold a login in its URL.
    let cluster = config.cluster_url.host().unwrap_or_default().to_owned();
    let clients = Clients::new(config).context(no_cluster)?;
    let listener = http::listen(args.health_address)
        .with_context(|| format!("cannot listen on {} (--health-address)", args.health_address))?;
    let (lease, leader_elect) = (args.lease(&clients.requests), args.leader_elect);
    let settings = Settings {
        namespaces: args.namespaces,
        selector: args.selector,
        max_concurrent_sweeps: args.max_concurrent_sweeps.into(),
        max_sweeps_per_server: args.max_sweeps_per_server.into(),
        max_deadline: args.max_deadline,
        object_metrics: args.object_metrics,
        instance: args.pod_name.clone().filter(|name| !name.is_empty()),
        default_roots,
    };
    let (readiness, metrics) = (Readiness::default(), Arc::new(Metrics::default()));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        health_address = %listener.local_addr()?,
        cluster,
        namespaces = if settings.namespaces.is_empty() { "(all)".into() } else { settings.namespaces.join(",") },
        selector = settings.selector,
        lease = leader_elect.then(|| format!("{}/{}", lease.namespace, lease.name)),
        identity = lease.identity,
        "starting"
    );
    let health = tokio::spawn(http::serve(listener, readiness.clone(), metrics.clone(), stop.clone()));
    let ended = CancellationToken::new();
    let (election, leadership) = if leader_elect {
        readiness.set(leader::PART, Some(format!("the first look at Lease {}/{}", lease.namespace, lease.name)));
        let (sender, leadership) = Leadership::elected();
        let (readiness, stop, ended) = (readiness.clone(), stop.clone(), ended.clone());
        let instruments = metrics.instruments.clone();
        (
            tokio::spawn(leader::elect(clients.requests.clone(), lease, sender, readiness, instruments, stop, ended)),
            leadership,
        )
    } else {
        (tokio::spawn(ended.clone().cancelled_owned()), Leadership::always(&stop))
    };
    let controller = tokio::spawn({
        let stop = stop.clone();
        async move { controller::run(clients, settings, leadership, readiness, &metrics, stop).await }
    });
    let mut tasks = Tasks { signals, health, election, controller };
    tasks.until_stopped(&stop).await?;
    tracing::info!("stopping");
    tasks.drain(&ended).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installs_with_other_objects_have_other_leases_and_replicas_have_one() {
        let name = |namespaces: &[&str], selector| {
            lease_name(&namespaces.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), selector)
        };
        assert_eq!(name(&[], None), "audit-log-sweeper");
        let all = [name(&[], None), name(&[], Some("a=b")), name(&["a"], None), name(&["a", "b"], None)];
        let different: HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "{all:?}");
        assert_eq!(name(&["a", "b"], Some("x")), name(&["b", "a"], Some("x")));
        assert!(all.iter().all(|name| name.len() <= 63));
    }

    fn parsed(args: &[&str]) -> Result<Run, String> {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            run: Run,
        }
        let parsed = <Alone as clap::Parser>::try_parse_from(["run"].iter().chain(args));
        parsed.map(|alone| alone.run.tidy()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_namespace_counts_once_and_an_empty_selector_is_none() {
        let run = parsed(&["--namespace=b", "--namespace=a", "--namespace=b", "--selector="]).unwrap();
        assert_eq!((run.namespaces, run.selector), (vec!["b".to_owned(), "a".to_owned()], None));
    }

    #[test]
    fn names_that_nothing_can_have_are_refused() {
        for bad in ["", "Bad Name!", "a/b", "../../x", "-a", "a_b", &"a".repeat(64)] {
            let error = parsed(&[&format!("--namespace={bad}")]).unwrap_err();
            assert!(error.contains("must be the name of a namespace"), "{error}");
            let error = parsed(&[&format!("--lease-name={bad}")]).err().filter(|_| bad.len() < 64);
            assert!(bad.len() == 64 || error.unwrap().contains("must be the name of a Lease"), "{bad}");
        }
        assert!(parsed(&["--lease-namespace=a.b"]).is_err());
        let good = ["--namespace=my-ns1", "--lease-name=a.b-c", "--lease-namespace="];
        assert_eq!(parsed(&good).unwrap().lease_name.as_deref(), Some("a.b-c"));
    }

    #[test]
    fn a_lease_lasts_whole_seconds() {
        assert_eq!(lease_duration("15s"), Ok(Duration::from_secs(15)));
        for bad in ["1500ms", "0s", "2h", "15", ""] {
            assert!(lease_duration(bad).is_err(), "{bad}");
        }
    }
}
