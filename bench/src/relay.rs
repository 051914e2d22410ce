//! A network that is slow: a relay before PostgreSQL that holds every answer back, and counts the round trips.

use anyhow::ensure;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// Connections end with what was measured over them.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Relay {
    pub address: SocketAddr,
    trips: Arc<AtomicU64>,
    open: Arc<AtomicU64>,
    listener: JoinHandle<()>,
}

impl Relay {
    /// Listens before the server at `port`.
    pub async fn new(port: u16, delay: Duration) -> anyhow::Result<Relay> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (trips, open) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (counted, opened) = (trips.clone(), open.clone());
        let listener = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::SeqCst);
                let (counted, opened) = (counted.clone(), opened.clone());
                // It ends with its connection.
                tokio::spawn(async move {
                    drop(serve(client, port, delay, counted).await);
                    opened.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Ok(Relay { address, trips, open, listener })
    }

    /// How often a client spoke and then waited for an answer, since it was asked last. Goodbyes are said in the background, so
    /// it waits for the ends of all connections.
    pub async fn trips(&self) -> anyhow::Result<u64> {
        let end = Instant::now() + PATIENCE;
        while self.open.load(Ordering::SeqCst) > 0 {
            ensure!(Instant::now() < end, "a connection through the relay is still open");
            sleep(Duration::from_millis(5)).await;
        }
        Ok(self.trips.swap(0, Ordering::SeqCst))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn serve(client: TcpStream, port: u16, delay: Duration, trips: Arc<AtomicU64>) -> std::io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // A trip begins with what the client says first after an answer.
    let answered = Arc::new(AtomicBool::new(true));
    let there = {
        let answered = answered.clone();
        async move {
            pass(from_client, to_server, Duration::ZERO, move || {
                if answered.swap(false, Ordering::SeqCst) {
                    trips.fetch_add(1, Ordering::SeqCst);
                }
            })
            .await
        }
    };
    let back = pass(from_server, to_client, delay, move || answered.store(true, Ordering::SeqCst));
    let (there, back) = tokio::join!(there, back);
    there.and(back)
}

/// Passes on what comes, each piece so long after it came: a slow way, not a narrow one.
async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    delay: Duration,
    seen: impl Fn(),
) -> std::io::Result<()> {
    let (sender, mut pieces) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let read = async move {
        let mut buffer = [0; 65536];
        loop {
            let n = from.read(&mut buffer).await?;
            if n == 0 || sender.send((Instant::now() + delay, buffer[..n].to_vec())).is_err() {
                return std::io::Result::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = pieces.recv().await {
            if !delay.is_zero() {
                sleep_until(due).await;
            }
            seen();
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    let (read, written) = tokio::join!(read, write);
    read.and(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn trips_are_counted_and_take_longer() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = echo.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = echo.accept().await.unwrap();
            let mut buffer = [0; 4];
            // An answer of two pieces to each question.
            while stream.read_exact(&mut buffer).await.is_ok() {
                stream.write_all(&buffer[..2]).await.unwrap();
                tokio::task::yield_now().await;
                stream.write_all(&buffer[2..]).await.unwrap();
            }
        });
        let relay = Relay::new(port, Duration::from_millis(5)).await.unwrap();
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        let started = Instant::now();
        let mut answer = [0; 4];
        for _ in 0..10 {
            stream.write_all(b"ping").await.unwrap();
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"ping");
        }
        assert!(started.elapsed() >= Duration::from_millis(50), "{:?}", started.elapsed());
        drop(stream);
        assert_eq!(relay.trips().await.unwrap(), 10);
        assert_eq!(relay.trips().await.unwrap(), 0);
        server.await.unwrap();
    }
}
