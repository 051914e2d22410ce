//! Servers that are slow or do not answer keep no other server's objects waiting.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use audit_log_sweeper::schedule::Grid;
use chrono::{DateTime, Utc};
use futures::{StreamExt, stream};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};
use support::json::merged;
use support::postgres;
use support::wait::eventually;
use tokio::net::TcpListener;

use crate::fixtures::operator::has;
use crate::fixtures::{AuditTable, FakePostgres, Misbehaviour, Operator, TcpFaultProxy, id};

fn at(status: &Value, field: &str) -> DateTime<Utc> {
    status[field].as_str().unwrap_or_else(|| panic!("no {field} in {status:#}")).parse().unwrap()
}

fn spec(secret: &str, rest: Value) -> Value {
    merged(
        json!({ "period": "5s", "database": { "secretRef": { "name": secret }, "tls": { "mode": "Disable" } } }),
        &rest,
    )
}

#[tokio::test]
async fn a_sweep_that_waits_for_its_server_heeds_an_edit() {
    let log = AuditTable::held(1, 60).await;
    let mut operator = Operator::absent().await;
    operator.secret_for(&log).await;
    operator.start_with(&["--max-sweeps-per-server=1"]).await;
    operator.apply("first", json!({ "batchSize": 1, "limit": 40, "period": "1h" })).await;
    log.until_swept(1).await;
    operator.apply("queued", json!({ "period": "1h" })).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Reconciling=True/Pending")).await;
    operator.apply("queued", json!({ "period": "1h", "suspend": true })).await;
    log.release().await;
    operator.until("first", "the sweep before it", |s| s["lastSweep"] != Value::Null).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;
    assert_eq!((log.timed_out().await, log.trail().await.len()), ((1..=40).collect(), 1));
}

/// How many objects there are of each kind, for each hundred in all.
#[derive(Clone, Copy)]
struct Shares {
    /// Their tables are as they should be. They share a namespace with the broken and the silent.
    healthy: u32,
    /// They cannot work, in ten ways.
    broken: u32,
    /// Their servers accept connections, half of them also logins, and then say nothing.
    silent: u32,
    /// Their servers take long for each row.
    slow: u32,
    /// Their servers send without end, or are none.
    flooding: u32,
    /// They reach one server by as many names, and sleep there for as long as they may.
    aliases: u32,
}

const SHARES: Shares = Shares { healthy: 64, broken: 10, silent: 8, slow: 8, flooding: 8, aliases: 2 };

/// How often each is swept, which is also how late a healthy one may be.
const PERIOD: &str = "30s";
const LATE: i64 = 30;

/// How many objects there are, in hundreds: one in the test suite, more with `cargo xtask crowd`.
fn hundreds() -> u32 {
    std::env::var("CROWD_HUNDREDS").map_or(1, |value| value.parse().unwrap())
}

/// What is wrong with the others: the spec, and what the status says of it.
fn broken() -> Vec<(&'static str, Value, &'static str)> {
    let database = |secret: &str| json!({ "database": { "secretRef": { "name": secret, "key": "uri" }, "tls": { "mode": "Disable" } } });
    let key = json!({ "database": { "secretRef": { "name": "db", "key": "dsn" }, "tls": { "mode": "Disable" } } });
    vec![
        ("no-secret", database("absent"), "SecretNotFound"),
        ("no-key", key, "SecretKeyMissing"),
        ("bad-uri", database("bad-uri"), "InvalidConnectionURI"),
        ("bad-password", database("bad-password"), "AuthenticationFailed"),
        ("no-database", database("no-database"), "DatabaseNotFound"),
        ("no-port", database("no-port"), "DatabaseUnreachable"),
        ("no-table", json!({ "table": "absent" }), "TableNotFound"),
        ("no-column", json!({ "columns": { "timeStarted": "absent" } }), "ColumnNotFound"),
        ("bad-value", json!({ "complete": [{ "column": "result_kind", "value": "absent" }] }), "SchemaMismatch"),
        ("no-right", json!({ "table": "forbidden" }), "PermissionDenied"),
    ]
}

/// A log with a table for each of these that works, with two stale rows and one fresh one, and one that is another's.
async fn crowded(healthy: u32) -> AuditTable {
    let log = AuditTable::new().await;
    log.run(&format!(
        "DO $$ BEGIN FOR n IN 1..{} LOOP \
           EXECUTE format('CREATE TABLE t_%s (LIKE audit_log INCLUDING ALL)', n); \
           EXECUTE format($i$INSERT INTO t_%s (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind) \
             SELECT ('00000000-0000-0000-0000-' || lpad((%s * 10 + i)::text, 12, '0'))::uuid, now() - age::interval, \
               'r', '/v1', 'op', '::1', 'unauthenticated' FROM (VALUES (1, '5 h'), (2, '4 h'), (3, '1 m')) AS v (i, age)$i$, n, n); \
         END LOOP; END $$",
        healthy
    ))
    .await;
    let superuser = postgres::shared().connect(&log.database.name).await.unwrap();
    superuser.batch_execute("CREATE TABLE forbidden (LIKE audit_log INCLUDING ALL)").await.unwrap();
    log
}

/// Healthy objects and broken ones in one namespace, with those whose servers are silent; the bad neighbours in others.
struct Crowd {
    shares: Shares,
    log: AuditTable,
    operator: Operator,
    /// Namespaces with slow servers, flooding servers, and one server under many names.
    tenants: [Operator; 3],
    slow: AuditTable,
    /// As long as they live, so do their servers.
    _relays: Vec<TcpFaultProxy>,
    _fakes: Vec<FakePostgres>,
    _deaf: Vec<TcpListener>,
}

impl Crowd {
    async fn new() -> Self {
        let Shares { healthy, broken, silent, slow, flooding, aliases } = SHARES;
        let [healthy, broken, silent, slow, flooding, aliases] =
            [healthy, broken, silent, slow, flooding, aliases].map(|share| share * hundreds());
        let shares = Shares { healthy, broken, silent, slow, flooding, aliases };
        let (log, slow) = (crowded(healthy).await, AuditTable::new().await);
        slow.start_many(5000).await;
        slow.before_update(
            "PERFORM pg_sleep(CASE WHEN current_setting('application_name') LIKE '%/alias-%' THEN 86400 ELSE 0.2 END);",
        )
        .await;
        let operator = Operator::absent().await;
        let tenants = [Operator::absent().await, Operator::absent().await, Operator::absent().await];
        Self { shares, log, operator, tenants, slow, _relays: vec![], _fakes: vec![], _deaf: vec![] }
    }

    /// Writes every Secret; a second time, every object has to be looked at anew.
    async fn write_secrets(&mut self) {
        let (operator, uri, mine) = (&self.operator, self.log.database.uri(), &self.log.database);
        operator.secret_for(&self.log).await;
        operator.secret("bad-uri", &[("uri", "127.0.0.1")]).await;
        operator.secret("bad-password", &[("uri", &uri.replace(&mine.password, "wrong"))]).await;
        operator.secret("no-database", &[("uri", &format!("{uri}_absent"))]).await;
        operator.secret("no-port", &[("uri", &uri.replace(&format!(":{}/", mine.port), ":1/"))]).await;
        let [slow, flooding, aliases] = &self.tenants;
        let Shares { silent, slow: many_slow, flooding: many_flooding, aliases: many_aliases, .. } = self.shares;
        for number in 0..silent {
            let uri = if number % 2 == 0 {
                self._fakes.push(FakePostgres::new(Misbehaviour::SilentAfterLogin).await);
                self._fakes.last().unwrap().uri()
            } else {
                self._deaf.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
                format!("postgresql://u:p@{}/d", self._deaf.last().unwrap().local_addr().unwrap())
            };
            operator.secret(&format!("silent-{number}"), &[("uri", &uri)]).await;
        }
        for number in 0..many_flooding {
            use Misbehaviour::{EndlessParameters, EndlessRows, Http, HugeMessage};
            let all = [HugeMessage, EndlessParameters, EndlessRows, Http];
            let fake = FakePostgres::new(all[number as usize % all.len()]).await;
            flooding.secret(&format!("flooding-{number}"), &[("uri", &fake.uri())]).await;
            self._fakes.push(fake);
        }
        for (tenant, name, many) in [(slow, "slow", many_slow), (aliases, "alias", many_aliases)] {
            for number in 0..many {
                // Another port is another server.
                let relay = TcpFaultProxy::new(postgres::shared().port()).await;
                let port = self.slow.database.port;
                let uri =
                    self.slow.database.uri().replace(&format!(":{port}/"), &format!(":{}/", relay.address.port()));
                tenant.secret(&format!("{name}-{number}"), &[("uri", &uri)]).await;
                self._relays.push(relay);
            }
        }
    }

    /// Applies all objects.
    async fn apply(&self) {
        let often = |spec: Value| merged(json!({ "period": PERIOD }), &spec);
        let long = json!({ "batchSize": 1, "deadline": "24h", "statementTimeout": "1h" });
        let [slow, flooding, aliases] = &self.tenants;
        let mut all: Vec<(&Operator, String, Value)> = vec![];
        for (tenant, name, many) in [
            (aliases, "alias", self.shares.aliases),
            (slow, "slow", self.shares.slow),
            (flooding, "flooding", self.shares.flooding),
            (&self.operator, "silent", self.shares.silent),
        ] {
            let rest = if name == "alias" { long.clone() } else { json!({ "batchSize": 1 }) };
            let named =
                |number| (tenant, format!("{name}-{number}"), spec(&format!("{name}-{number}"), often(rest.clone())));
            all.extend((0..many).map(named));
        }
        for number in 0..self.shares.broken / 10 {
            let named = |(name, spec, _)| (&self.operator, format!("{name}-{number}"), often(spec));
            all.extend(broken().into_iter().map(named));
        }
        let table = |number| json!({ "table": format!("t_{number}") });
        all.extend((1..=self.shares.healthy).map(|n| (&self.operator, format!("healthy-{n}"), often(table(n)))));
        assert_eq!(all.len(), 100 * hundreds() as usize);
        let applied = all.iter().map(|(operator, name, spec)| operator.apply(name, spec.clone()));
        drop(stream::iter(applied).buffer_unordered(8).collect::<Vec<_>>().await);
    }

    async fn start(&mut self) {
        let namespaces = self.tenants.each_ref().map(|tenant| format!("--namespace={}", tenant.namespace));
        let [a, b, c] = namespaces.each_ref().map(String::as_str);
        self.operator.start_with(&["--pod-uid=u", a, b, c]).await;
    }

    /// Waits until each healthy object was swept in a slot that came after now, and checks how late the latest was.
    async fn assert_on_time(&self, when: &str) {
        let begin = Utc::now();
        let mut late: BTreeMap<String, (i64, Value)> = BTreeMap::new();
        let watch = async {
            let objects = watcher(self.operator.api(), watcher::Config::default()).default_backoff().applied_objects();
            let mut seen = pin!(objects);
            while late.len() < self.shares.healthy as usize {
                let object = seen.next().await.unwrap().unwrap();
                let (name, status) = (object.metadata.name.unwrap(), json!(object.status));
                if !name.starts_with("healthy-") || status["lastSweep"] == Value::Null {
                    continue;
                }
                let (slot, start) = (at(&status, "lastScheduleTime"), at(&status, "lastAttemptTime"));
                if slot > begin {
                    let uid = object.metadata.uid.unwrap();
                    let period = PERIOD.parse::<audit_log_sweeper::api::Duration>().unwrap().as_std();
                    assert_eq!(Grid::new(&uid, period).latest(slot), slot, "{name}: {status:#}");
                    let lag = (start - slot).num_seconds();
                    let most = late.entry(name).or_insert((lag, Value::Null));
                    *most = (lag.max(most.0), status);
                }
            }
        };
        let within = tokio::time::timeout(Duration::from_secs(150), watch).await;
        let waits = |n: &u32| !late.contains_key(&format!("healthy-{n}"));
        assert!(
            within.is_ok(),
            "{when}: not swept in a slot: {:?}",
            (1..=self.shares.healthy).filter(waits).collect::<Vec<_>>()
        );
        let mut lags: Vec<_> = late.values().map(|(lag, _)| *lag).collect();
        lags.sort_unstable();
        let took = (Utc::now() - begin).num_seconds();
        println!(
            "{} objects, {when}: seconds late: median {}, most {}; {took} s",
            100 * hundreds(),
            lags[lags.len() / 2],
            lags[lags.len() - 1]
        );
        late.retain(|_, (lag, _)| *lag > LATE);
        assert!(late.is_empty(), "{when}: {late:#?}\n{}", self.operator.process.as_ref().unwrap().log_tail(200));
    }

    async fn until_all_were_swept(&self) {
        eventually("each healthy object to be swept once", Duration::from_secs(120), async || {
            let all = self.operator.api().list(&Default::default()).await.unwrap().items;
            let healthy = all.iter().filter(|object| object.metadata.name.as_deref().unwrap().starts_with("healthy-"));
            let swept = healthy.filter(|object| json!(object.status)["lastSweep"] != Value::Null).count();
            if swept == self.shares.healthy as usize { Ok(()) } else { Err(format!("{swept} were swept")) }
        })
        .await;
    }
}

#[tokio::test]
async fn in_a_crowd_the_healthy_are_on_time_whatever_the_others_meet() {
    let mut crowd = Crowd::new().await;
    crowd.write_secrets().await;
    crowd.start().await;
    crowd.apply().await;
    crowd.until_all_were_swept().await;
    crowd.assert_on_time("steady").await;
    crowd.operator.process.take().unwrap().kill9().unwrap();
    crowd.start().await;
    crowd.assert_on_time("after a restart").await;
    crowd.write_secrets().await;
    crowd.assert_on_time("after all Secrets changed").await;

    let Crowd { shares, log, operator, tenants, slow, .. } = &crowd;
    for number in 1..=shares.healthy {
        let done = format!("SELECT id FROM t_{number} WHERE result_kind = 'timeout' ORDER BY id");
        assert_eq!(log.query(&done).await, [id(number * 10 + 1), id(number * 10 + 2)], "t_{number}");
    }
    for object in operator.api().list(&Default::default()).await.unwrap() {
        let (name, status) = (object.metadata.name.unwrap(), json!(object.status));
        let kind = broken().into_iter().find(|(kind, ..)| name.starts_with(kind));
        let expected = match kind {
            Some((_, _, reason)) => vec![format!("Ready=False/{reason}")],
            None if name.starts_with("silent-") => {
                ["ResponseTimeout", "LoginTimeout"].map(|reason| format!("Ready=False/{reason}")).to_vec()
            }
            None => vec!["Ready=True/Swept".to_owned()],
        };
        assert!(expected.iter().any(|expected| has(&status, expected)), "{name}: {status:#}");
        let is_healthy = name.starts_with("healthy-");
        assert!(!is_healthy || status["totals"]["failures"] == json!(0), "{name}: {status:#}");
        let swept = if is_healthy { 2 } else { 0 };
        assert_eq!(status["totals"]["timedOut"].as_i64().unwrap_or(0), swept, "{name}: {status:#}");
    }
    for object in tenants[1].api().list(&Default::default()).await.unwrap() {
        let status = json!(object.status);
        assert!(has(&status, "Ready=False/ProtocolError"), "{status:#}");
    }
    assert!(!slow.timed_out().await.is_empty(), "the slow ones get on, too");
}
