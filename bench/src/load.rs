//! The application in front of the table: requests at a fixed rate, whatever becomes of them, so that a stall is felt by all that
//! should have begun meanwhile.

use anyhow::Context;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::postgres::PostgresServer;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep_until;
use tokio_postgres::{Client, Statement};

/// As many as a small service has.
const CONNECTIONS: usize = 32;

/// A request completes its row so long after it started it.
const REQUEST: Duration = Duration::from_millis(100);

const START: &str = "INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind)
    VALUES (('00000000-0000-0000-0000-' || lpad(to_hex($1::bigint), 12, '0'))::uuid, now(), 'load-' || $1::bigint, '/v1/instances',
    'instance_list', '192.0.2.7', 'unauthenticated')";
const COMPLETE: &str = "UPDATE audit_log SET time_completed = now(), result_kind = 'success', http_status_code = 200
    WHERE id = ('00000000-0000-0000-0000-' || lpad(to_hex($1::bigint), 12, '0'))::uuid AND time_completed IS NULL";

struct Connection {
    client: Client,
    start: Statement,
    complete: Statement,
}

impl Connection {
    async fn open(server: &PostgresServer, database: &str) -> anyhow::Result<Connection> {
        let client = server.connect(database).await?;
        let (start, complete) = (client.prepare(START).await?, client.prepare(COMPLETE).await?);
        Ok(Connection { client, start, complete })
    }

    /// Makes one request. Its completion is due as soon as its row is there.
    async fn request(&self, number: i64) -> anyhow::Result<Request> {
        let due = Instant::now();
        self.client.execute(&self.start, &[&number]).await?;
        let started = Instant::now();
        let changed = self.client.execute(&self.complete, &[&number]).await?;
        anyhow::ensure!(changed == 1, "a row of a request was not there to be completed");
        Ok(Request { due, started, complete_due: started, completed: Instant::now() })
    }
}

/// Connections that are shared by turns.
struct Pool {
    free: Mutex<Vec<Connection>>,
    permits: Semaphore,
}

impl Pool {
    async fn new(server: &PostgresServer, database: &str) -> anyhow::Result<Arc<Pool>> {
        let mut free = vec![];
        for _ in 0..CONNECTIONS {
            free.push(Connection::open(server, database).await?);
        }
        Ok(Arc::new(Pool { free: Mutex::new(free), permits: Semaphore::new(CONNECTIONS) }))
    }

    async fn execute(&self, which: fn(&Connection) -> &Statement, request: i64) -> anyhow::Result<u64> {
        let _permit = self.permits.acquire().await?;
        let connection = self.free.lock().await.pop().context("a permit is a connection")?;
        let done = connection.client.execute(which(&connection), &[&request]).await;
        self.free.lock().await.push(connection);
        Ok(done?)
    }
}

/// One request: when its two statements were due, and when each was done.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub due: Instant,
    pub started: Instant,
    pub complete_due: Instant,
    pub completed: Instant,
}

/// How long statements took that were due in a window, in ms.
#[derive(Debug, Default)]
pub struct Latencies {
    pub start: Vec<f64>,
    pub complete: Vec<f64>,
}

impl Latencies {
    pub fn within(requests: &[Request], from: Instant, to: Instant) -> Latencies {
        let window = from..to;
        let millis = |due: Instant, done: Instant| {
            window.contains(&due).then(|| done.saturating_duration_since(due).as_secs_f64() * 1000.0)
        };
        Latencies {
            start: requests.iter().filter_map(|request| millis(request.due, request.started)).collect(),
            complete: requests.iter().filter_map(|request| millis(request.complete_due, request.completed)).collect(),
        }
    }
}

/// Requests that go on until they are stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    requests: JoinHandle<anyhow::Result<Vec<Request>>>,
}

impl Load {
    /// So many requests a second, from now on.
    pub async fn start(server: &PostgresServer, database: &str, rate: f64) -> anyhow::Result<Load> {
        let pool = Pool::new(server, database).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, due) = mpsc::unbounded_channel();
        let stopped = stop.clone();
        // The runtime's timer counts in whole milliseconds; a thread of its own wakes up in time.
        thread::spawn(move || {
            let began = Instant::now();
            for request in 1_u32.. {
                let due = began + Duration::from_secs_f64(f64::from(request) / rate);
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if stopped.load(Ordering::SeqCst) || sender.send((i64::from(request), due)).is_err() {
                    break;
                }
            }
        });
        Ok(Load { stop, requests: tokio::spawn(serve(pool, due)) })
    }

    /// Starts no further request; all there were, once the last is done.
    pub async fn end(self) -> anyhow::Result<Vec<Request>> {
        self.stop.store(true, Ordering::SeqCst);
        self.requests.await?
    }
}

async fn serve(pool: Arc<Pool>, mut due: mpsc::UnboundedReceiver<(i64, Instant)>) -> anyhow::Result<Vec<Request>> {
    let (mut running, mut done) = (JoinSet::new(), vec![]);
    while let Some((number, due)) = due.recv().await {
        let pool = pool.clone();
        running.spawn(async move {
            pool.execute(|connection| &connection.start, number).await?;
            let started = Instant::now();
            let complete_due = started.max(due) + REQUEST;
            sleep_until(complete_due.into()).await;
            let changed = pool.execute(|connection| &connection.complete, number).await?;
            anyhow::ensure!(changed == 1, "a row of a request was not there to be completed");
            anyhow::Ok(Request { due, started, complete_due, completed: Instant::now() })
        });
        while let Some(request) = running.try_join_next() {
            done.push(request??);
        }
    }
    while let Some(request) = running.join_next().await {
        done.push(request??);
    }
    Ok(done)
}

/// Requests of connections that each make the next request as soon as the last one is done.
pub struct Saturation {
    pub began: Instant,
    pub requests: Vec<Request>,
}

impl Saturation {
    /// Opens the connections first, so that they take none of the time.
    pub async fn run(
        server: &PostgresServer,
        database: &str,
        connections: u8,
        time: Duration,
    ) -> anyhow::Result<Saturation> {
        let mut open = vec![];
        for _ in 0..connections {
            open.push(Connection::open(server, database).await?);
        }
        let (mut running, mut requests) = (JoinSet::new(), vec![]);
        let began = Instant::now();
        for (index, connection) in (1_i64..).zip(open) {
            running.spawn(async move {
                // Numbers that no load has.
                let mut numbers = (index << 40)..;
                let mut done = vec![];
                while let Some(number) = numbers.next().filter(|_| began.elapsed() < time) {
                    done.push(connection.request(number).await?);
                }
                anyhow::Ok(done)
            });
        }
        while let Some(done) = running.join_next().await {
            requests.extend(done??);
        }
        Ok(Saturation { began, requests })
    }
}

/// How many requests a second eight connections can make.
pub async fn capacity(server: &PostgresServer, database: &str, time: Duration) -> anyhow::Result<f64> {
    Ok(Saturation::run(server, database, 8, time).await?.requests.len() as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_counts_from_when_a_statement_was_due() {
        let zero = Instant::now();
        let at = |millis| zero + Duration::from_millis(millis);
        let request = |due, started, complete_due, completed| Request {
            due: at(due),
            started: at(started),
            complete_due: at(complete_due),
            completed: at(completed),
        };
        let requests = [request(0, 1, 101, 103), request(10, 500, 600, 601), request(50, 51, 151, 155)];
        let found = Latencies::within(&requests, at(10), at(150));
        // The second waited for a stall, and its completion is due later for it.
        assert_eq!((found.start, found.complete), (vec![490.0, 1.0], vec![2.0]));
    }
}
