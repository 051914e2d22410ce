//! Two replicas under every fault at once; then a checker proves from what the database recorded that no promise was broken.
//!
//! A trigger records each row that is completed, with the session that did it. The first half is without kill -9, so that
//! the counts must be exact. Change the length by `CHAOS_SECONDS` and the course by `CHAOS_SEED` (`cargo xtask chaos`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use kube::api::{Patch, PatchParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::Process;
use support::scratch::Scratch;
use support::wait::eventually;
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::fixtures::http_fault_proxy::{End, Refusal};
use crate::fixtures::operator::{has, health_address, replica};
use crate::fixtures::tcp_fault_proxy::Course;
use crate::fixtures::{AuditTable, FakePostgres, HttpFaultProxy, Misbehaviour, Operator, TcpFaultProxy};

const OBJECTS: usize = 12;
const LIMIT: i64 = 20;

/// Each table records what was completed, by whom.
const SCHEMA: &str = "
    CREATE TABLE swept (app text, session text, name text, at timestamptz);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO swept SELECT application_name, pid || ' ' || backend_start, TG_TABLE_NAME, clock_timestamp()
        FROM pg_stat_get_activity(pg_backend_pid());
      RETURN NULL; END $$;
    DO $$ BEGIN FOR n IN 0..11 LOOP
      EXECUTE format('CREATE TABLE t_%s (id bigserial PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text)', n);
      EXECUTE format('CREATE INDEX ON t_%s (time_started, id) WHERE num_nulls(time_completed) = 1', n);
      EXECUTE format('CREATE TRIGGER record AFTER UPDATE ON t_%s FOR EACH ROW EXECUTE FUNCTION record()', n);
    END LOOP; END $$";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

/// One of the replicas, with its own way to the API server.
struct Replica {
    pod: &'static str,
    /// Ends before its way to the API server does, else it waits for that one.
    process: Option<Process>,
    api: HttpFaultProxy,
    scratch: Scratch,
    /// What those before it logged.
    logs: Vec<String>,
}

struct Chaos {
    replicas: Vec<Replica>,
    log: AuditTable,
    operator: Operator,
    relay: TcpFaultProxy,
    random: fastrand::Rng,
    /// When a replica was frozen, until it had time to find that out.
    frozen: Vec<(DateTime<Utc>, DateTime<Utc>)>,
    faults: BTreeMap<&'static str, u32>,
    _fakes: Vec<FakePostgres>,
}

impl Chaos {
    async fn new(seed: u64) -> Self {
        let (log, operator) = (AuditTable::empty().await, Operator::absent().await);
        log.run(SCHEMA).await;
        let relay = TcpFaultProxy::new(log.port()).await;
        let uri = log.uri_at(relay.address.port());
        operator.secret("db", &[("uri", &uri)]).await;
        let mut fakes = vec![];
        for (name, misbehaviour) in [("silent", Misbehaviour::SilentAfterLogin), ("flood", Misbehaviour::EndlessRows)] {
            let fake = FakePostgres::new(misbehaviour).await;
            operator.secret(name, &[("uri", &fake.uri())]).await;
            fakes.push(fake);
            for number in 0..4 {
                let database = json!({ "secretRef": { "name": name } });
                operator.apply(&format!("{name}-{number}"), json!({ "database": database, "period": "5s" })).await;
            }
        }
        for number in 0..OBJECTS {
            let spec = json!({ "table": format!("t_{number}"), "period": "5s", "limit": LIMIT, "batchSize": 5 });
            operator.apply(&format!("app-{number}"), spec).await;
        }
        let mut replicas = vec![];
        for pod in ["a", "b"] {
            let scratch = Scratch::new(None).unwrap();
            let api = HttpFaultProxy::new(&operator.kubeconfig(None).await, &scratch).await;
            replicas.push(Replica { pod, api, scratch, process: None, logs: vec![] });
        }
        let random = fastrand::Rng::with_seed(seed);
        let (frozen, faults) = (vec![], BTreeMap::new());
        let mut chaos = Self { replicas, log, operator, relay, random, frozen, faults, _fakes: fakes };
        (0..2).for_each(|index| chaos.start(index));
        chaos
    }

    fn start(&mut self, index: usize) {
        let replica_ = &mut self.replicas[index];
        let uid = format!("--pod-uid={}", replica_.pod);
        let args = [uid.as_str(), "--lease-duration=3s"];
        let namespace = &self.operator.namespace;
        let process = replica(replica_.pod, &replica_.api.kubeconfig, &replica_.scratch, namespace, &args);
        replica_.process = Some(process);
    }

    fn signal(&self, index: usize, signal: Signal) {
        self.replicas[index].process.as_ref().unwrap().signal(signal).unwrap();
    }

    fn app(&mut self) -> String {
        format!("app-{}", self.random.usize(0..OBJECTS))
    }

    async fn patch(&self, name: &str, subresource: Option<&str>, patch: Value) {
        let (api, params, patch) = (self.operator.api(), PatchParams::default(), Patch::Merge(&patch));
        match subresource {
            Some(_) => drop(api.patch_status(name, &params, &patch).await.unwrap()),
            None => drop(api.patch(name, &params, &patch).await.unwrap()),
        }
    }

    /// Rows that are stale from the start, in any table.
    async fn write(&mut self) {
        for _ in 0..3 {
            let (table, rows) = (self.random.usize(0..OBJECTS), self.random.u32(1..30));
            self.log
                .run(&format!(
                    "INSERT INTO t_{table} (time_started) SELECT now() - interval '2 h' FROM generate_series(1, {rows})"
                ))
                .await;
        }
    }

    /// One fault after the other, and rows beside them.
    async fn rage(&mut self, time: Duration, with_losses: bool) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.write().await;
            let (index, pause) = (self.random.usize(0..2), Duration::from_millis(self.random.u64(200..2500)));
            let fault = match self.random.u8(if with_losses { 0..11 } else { 0..8 }) {
                0 => self.freeze(index, pause * 3).await,
                1 => self.refuse(index, pause).await,
                2 => {
                    self.replicas[index].api.delay(pause);
                    sleep(pause * 2).await;
                    self.replicas[index].api.delay(Duration::ZERO);
                    "slow API server"
                }
                3 => {
                    let how = if self.random.bool() { End::Closed } else { End::Broken };
                    self.replicas[index].api.end_watches(how);
                    "watches ended"
                }
                4 => {
                    let app = self.app();
                    let time = (Utc::now() + TimeDelta::days(self.random.i64(-3..400))).to_rfc3339();
                    let field = ["nextScheduleTime", "lastAttemptTime"][self.random.usize(0..2)];
                    self.patch(&app, Some("status"), json!({ "status": { field: time } })).await;
                    "status edited"
                }
                5 => {
                    for _ in 0..10 {
                        let (app, token) = (self.app(), self.random.u32(..).to_string());
                        let asked = json!({ "metadata": { "annotations": { "auditlog.dev/requestedAt": token } } });
                        self.patch(&app, None, asked).await;
                    }
                    "ten requests"
                }
                6 => {
                    let (app, limit) = (self.app(), self.random.i64(10..=LIMIT));
                    self.patch(&app, None, json!({ "spec": { "limit": limit } })).await;
                    "spec edited"
                }
                7 => {
                    let log = self.replicas[index].process.as_ref().unwrap().log_tail(usize::MAX);
                    let mut slow = vec![];
                    if let Some(address) = health_address(&log) {
                        for _ in 0..200 {
                            slow.extend(TcpStream::connect(&address).await.ok());
                        }
                    }
                    sleep(pause).await;
                    "health port flooded"
                }
                8 => {
                    let replica = &mut self.replicas[index];
                    let process = replica.process.take().unwrap();
                    let log = process.log().to_owned();
                    process.kill9().unwrap();
                    replica.logs.push(std::fs::read_to_string(log).unwrap());
                    self.start(index);
                    "kill -9"
                }
                9 => {
                    self.relay.set(Course::Deaf);
                    sleep(pause).await;
                    self.relay.set(Course::To(self.log.port()));
                    "silent database"
                }
                _ => {
                    self.relay.set(Course::Closed);
                    sleep(pause / 4).await;
                    self.relay.set(Course::To(self.log.port()));
                    "cut database"
                }
            };
            *self.faults.entry(fault).or_default() += 1;
            sleep(Duration::from_millis(self.random.u64(50..500))).await;
        }
    }

    async fn freeze(&mut self, index: usize, pause: Duration) -> &'static str {
        let begin = Utc::now();
        self.signal(index, Signal::SIGSTOP);
        sleep(pause).await;
        self.signal(index, Signal::SIGCONT);
        self.frozen.push((begin, Utc::now() + TimeDelta::seconds(2)));
        "SIGSTOP"
    }

    async fn refuse(&mut self, index: usize, pause: Duration) -> &'static str {
        let refusals = [
            Refusal::all(500),
            Refusal::all(503),
            Refusal::all(429),
            Refusal { code: 410, of: "watch=true", spare: 0 },
            Refusal { code: 409, of: "/status", spare: 0 },
            Refusal { code: 422, of: "/status", spare: 0 },
        ];
        self.replicas[index].api.refuse(Some(refusals[self.random.usize(0..refusals.len())]));
        sleep(pause).await;
        self.replicas[index].api.refuse(None);
        "API server refuses"
    }

    /// Waits until nothing is left to sweep and every count is written.
    async fn settle(&self) {
        let healed = Utc::now();
        eventually("all rows to be swept and counted", Duration::from_secs(120), async || {
            let mut left = vec![];
            for number in 0..OBJECTS {
                let status = json!(self.operator.api().get(&format!("app-{number}")).await.unwrap().status);
                let open =
                    self.log.query(&format!("SELECT count(*) FROM t_{number} WHERE time_completed IS NULL")).await;
                let swept: Option<DateTime<Utc>> = status["lastSuccessfulTime"].as_str().map(|at| at.parse().unwrap());
                if open != ["0"] || swept <= Some(healed + TimeDelta::seconds(6)) || !has(&status, "Ready=True/Swept") {
                    left.push(format!("app-{number}: {open:?} open, {status}"));
                }
            }
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
        .await;
    }

    /// Rows that the table shows and that the status counts, of all objects.
    async fn counts(&self) -> Vec<(i64, i64)> {
        let mut counts = vec![];
        for number in 0..OBJECTS {
            let status = json!(self.operator.api().get(&format!("app-{number}")).await.unwrap().status);
            let rows = self.log.query(&format!("SELECT count(*) FROM swept WHERE name = 't_{number}'")).await;
            counts.push((rows[0].parse().unwrap(), status["totals"]["timedOut"].as_i64().unwrap_or(0)));
        }
        counts
    }

    /// No session takes more than a limit; the sessions of one object follow each other, unless a replica was frozen.
    async fn assert_promises_were_kept(&self) -> usize {
        let sql = "SELECT app, session, count(*), min(at), max(at) FROM swept GROUP BY 1, 2 ORDER BY 1, 4";
        let rows = self.log.client.query(sql, &[]).await.unwrap();
        let mut before: Option<(String, DateTime<Utc>)> = None;
        for row in &rows {
            let (app, count, from, to): (String, i64, DateTime<Utc>, DateTime<Utc>) =
                (row.get(0), row.get(2), row.get(3), row.get(4));
            assert!(count <= LIMIT, "{count} rows in one sweep of {app}");
            let overlaps = before.as_ref().is_some_and(|(other, end)| *other == app && *end >= from);
            let excused = self.frozen.iter().any(|(begin, end)| from <= *end && to >= *begin);
            assert!(!overlaps || excused, "two sessions of {app} at once, at {from}: {rows:?}");
            before = Some((app, to));
        }
        for replica in &self.replicas {
            let current = std::fs::read_to_string(replica.process.as_ref().unwrap().log()).unwrap();
            for log in replica.logs.iter().chain([&current]) {
                assert!(!log.contains("panicked") && !log.contains("InternalError"), "{log}");
            }
        }
        rows.len()
    }

    /// Descriptors and resident kB of each replica.
    fn resources(&self) -> Vec<(usize, u64)> {
        let of = |replica: &Replica| {
            let pid = replica.process.as_ref().unwrap().pid();
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
            (descriptors, rss.trim().trim_end_matches(" kB").parse().unwrap())
        };
        self.replicas.iter().map(of).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_chaos_breaks_a_promise() {
    let (seconds, seed) = (setting("CHAOS_SECONDS", 20), setting("CHAOS_SEED", 1));
    let half = Duration::from_secs(seconds) / 2;
    let mut chaos = Chaos::new(seed).await;
    chaos.rage(half, false).await;
    chaos.settle().await;
    for (number, (rows, counted)) in chaos.counts().await.into_iter().enumerate() {
        assert_eq!(rows, counted, "rows and count of app-{number}, without a kill; {:?}", chaos.faults);
    }
    chaos.rage(half, true).await;
    chaos.settle().await;
    let counts = chaos.counts().await;
    for (number, (rows, counted)) in counts.iter().enumerate() {
        assert!(counted <= rows, "app-{number} counts {counted} of {rows} rows; {:?}", chaos.faults);
    }
    let sessions = chaos.assert_promises_were_kept().await;
    let resources = chaos.resources();
    assert!(resources.iter().all(|(descriptors, rss)| *descriptors < 150 && *rss < 200_000), "{resources:?}");
    let (rows, counted) = counts.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!(
        "chaos of {seconds} s, seed {seed}: {OBJECTS} objects and 8 that cannot be swept, {sessions} sweeps with rows, {rows} \
         rows, {counted} of them counted, descriptors and kB {resources:?}; {:?}",
        chaos.faults
    );
}
