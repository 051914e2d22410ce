//! How fast a backlog is drained: in two layouts, under three states of statistics, beside an old snapshot, and over a slow
//! network.

use super::{Bench, rotated};
use crate::relay::Relay;
use crate::results::{Sample, Samples};
use crate::steps::Steps;
use crate::subjects::Subject;
use crate::table::{Layout, Statistics};
use anyhow::ensure;
use std::time::{Duration, Instant};

/// What the slow network adds to a round trip.
const DELAY: Duration = Duration::from_millis(2);

impl Bench<'_> {
    pub(super) async fn drain(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let mut subjects = vec![Subject::Ours, Subject::Unbounded, Subject::Original];
        subjects.extend(self.means.psql.is_some().then_some(Subject::Shell));
        subjects.push(Subject::Procedure);
        let rounds = self.options.rounds;
        for layout in [Layout::Block, Layout::Interleaved] {
            let mut steps = Steps::new(layout.name(), subjects.len() * rounds as usize);
            for round in 0..rounds {
                for subject in rotated(&subjects, round) {
                    steps.next(subject.name());
                    let copy = self.copy(layout).await?;
                    let (took, rows) = self.time(subject, &copy).await?;
                    let values = [("seconds", took.as_secs_f64()), ("rows", rows)];
                    samples.push(Sample::new(layout.name(), subject.name(), round, values));
                    copy.drop().await?;
                }
            }
        }
        Ok(samples)
    }

    pub(super) async fn statistics(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let rounds = self.options.rounds;
        let mut steps = Steps::new("statistics", Statistics::ALL.len() * rounds as usize);
        for round in 0..rounds {
            for statistics in rotated(&Statistics::ALL, round) {
                steps.next(statistics.name());
                let copy = self.copy(Layout::Block).await?.with(statistics).await?;
                let (took, rows) = self.time(Subject::Ours, &copy).await?;
                let values = [("seconds", took.as_secs_f64()), ("rows", rows)];
                samples.push(Sample::new(statistics.name(), Subject::Ours.name(), round, values));
                copy.drop().await?;
            }
        }
        Ok(samples)
    }

    pub(super) async fn snapshot(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let rounds = self.options.rounds;
        let subjects = [Subject::Ours, Subject::Original];
        let mut steps = Steps::new("beside an old snapshot", 2 * subjects.len() * rounds as usize);
        for layout in [Layout::Block, Layout::Interleaved] {
            for round in 0..rounds {
                for subject in rotated(&subjects, round) {
                    steps.next(subject.name());
                    let copy = self.copy(layout).await?;
                    let old = copy.connect().await?;
                    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class").await?;
                    let (took, rows) = self.time(subject, &copy).await?;
                    // It was held to the end.
                    old.batch_execute("COMMIT").await?;
                    let values = [("seconds", took.as_secs_f64()), ("rows", rows)];
                    samples.push(Sample::new(layout.name(), subject.name(), round, values));
                    drop(old);
                    copy.drop().await?;
                }
            }
        }
        Ok(samples)
    }

    /// Ours alone tells how many batches it made; the others' are as many as fit.
    pub(super) async fn trips(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let (rounds, stale, batch) = (self.options.rounds, self.options.stale, self.options.batch);
        let relay = Relay::new(self.server.port(), DELAY).await?;
        let subjects = [Subject::Ours, Subject::Original];
        let mut steps = Steps::new("2 ms away", subjects.len() * rounds as usize);
        for round in 0..rounds {
            for subject in rotated(&subjects, round) {
                steps.next(subject.name());
                let copy = self.copy(Layout::Block).await?;
                let near = format!("127.0.0.1:{}", self.server.port());
                let far = copy.uri().replace(&near, &relay.address.to_string());
                ensure!(far != copy.uri(), "the relay has the server's address");
                relay.trips().await?;
                let started = Instant::now();
                let batches = match subject {
                    Subject::Ours => self.means.product.sweep(&far, stale, batch).await?.number("batches"),
                    _ => {
                        subject.drain(self.means, &far, stale).await?;
                        (stale / batch + 1) as f64
                    }
                };
                let seconds = started.elapsed().as_secs_f64();
                let trips = relay.trips().await? as f64;
                copy.check_all().await?;
                // The same with nothing to do: what each costs once.
                subject.drain(self.means, &far, stale).await?;
                let idle = relay.trips().await? as f64;
                let values = [("seconds", seconds), ("batches", batches), ("trips", trips), ("trips when idle", idle)];
                samples.push(Sample::new("2 ms away", subject.name(), round, values));
                copy.drop().await?;
            }
        }
        Ok(samples)
    }
}
