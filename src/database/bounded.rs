//! Bounds what a server may send, in a stream below the driver, which keeps whatever arrives.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use futures::TryFutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

/// The most bytes of the login, and of the answer to the first statement. Nothing limits how many connections come so far.
const LOGIN: usize = 64 * 1024;

/// The most bytes of one message.
const MESSAGE: usize = 1024 * 1024;

/// The most bytes of one answer, with all that the server sends beside it.
const ANSWER: usize = 2 * MESSAGE;

/// The most rows of one answer.
const ROWS: usize = 50_000;

/// A message begins with its type and its length, which counts itself.
const HEADER: usize = 5;

/// Type of the message that ends the login and each answer: `ReadyForQuery`.
const READY: u8 = b'Z';

/// Type of the message with a row: `DataRow`.
const ROW: u8 = b'D';

/// What a server sent that is not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Excess {
    #[error("a message that is none of PostgreSQL's")]
    Malformed,
    #[error("a message of {0} bytes; {MESSAGE} are the most")]
    Message(usize),
    #[error("more than {LOGIN} bytes during the login")]
    Login,
    #[error("more than {ANSWER} bytes in one answer, as for a table with thousands of partitions")]
    Answer,
    #[error("more than {ROWS} rows in one answer, as for a table with thousands of partitions")]
    Rows,
}

/// Where a stream tells what it did not take. The driver does not pass on its errors.
pub type Exceeded = Arc<OnceLock<Excess>>;

/// Counts what the server sends, message by message.
#[derive(Debug, Default)]
struct Meter {
    /// How often it was ready: once after the login, once after each answer.
    answers: u64,
    /// What has come of the next header.
    header: [u8; HEADER],
    header_len: usize,
    /// What is still to come of the message.
    body: usize,
    bytes: usize,
    rows: usize,
}

impl Meter {
    fn count(&mut self, mut bytes: &[u8]) -> Result<(), Excess> {
        while let Some((byte, rest)) = bytes.split_first() {
            if self.body > 0 {
                let (_, next) = bytes.split_at(self.body.min(bytes.len()));
                self.body -= bytes.len() - next.len();
                bytes = next;
                continue;
            }
            bytes = rest;
            if let Some(place) = self.header.get_mut(self.header_len) {
                *place = *byte;
            }
            self.header_len += 1;
            if self.header_len == HEADER {
                self.header_len = 0;
                self.begin()?;
            }
        }
        Ok(())
    }

    /// Begins the message of the header that has come.
    fn begin(&mut self) -> Result<(), Excess> {
        let [kind, length @ ..] = self.header;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if !kind.is_ascii_alphanumeric() {
            return Err(Excess::Malformed);
        }
        if length > MESSAGE {
            return Err(Excess::Message(length));
        }
        self.body = length.checked_sub(HEADER - 1).ok_or(Excess::Malformed)?;
        self.bytes += length + 1;
        self.rows += usize::from(kind == ROW);
        match self {
            Self { answers: 0..2, bytes, .. } if *bytes > LOGIN => return Err(Excess::Login),
            Self { bytes, .. } if *bytes > ANSWER => return Err(Excess::Answer),
            Self { rows, .. } if *rows > ROWS => return Err(Excess::Rows),
            _ => {}
        }
        if kind == READY {
            (self.answers, self.bytes, self.rows) = (self.answers.saturating_add(1), 0, 0);
        }
        Ok(())
    }
}

/// A stream that fails as soon as the server sends too much.
#[derive(Debug)]
pub struct Bounded<S> {
    stream: S,
    meter: Meter,
    exceeded: Exceeded,
}

impl<S> Bounded<S> {
    /// Bounds a stream of messages, not of TLS records.
    pub fn new(stream: S, exceeded: Exceeded) -> Self {
        Self { stream, meter: Meter::default(), exceeded }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let (_, new) = buf.filled().split_at(before);
        Poll::Ready(this.meter.count(new).map_err(|excess| {
            this.exceeded.get_or_init(|| excess);
            io::Error::new(io::ErrorKind::InvalidData, excess)
        }))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Bounded<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.stream.channel_binding()
    }
}

/// Opens TLS, and bounds what comes out of it.
#[derive(Debug)]
pub struct BoundedTls<C> {
    pub connect: C,
    pub exceeded: Exceeded,
}

impl<S, C> TlsConnect<S> for BoundedTls<C>
where
    C: TlsConnect<S>,
    C::Stream: Unpin,
    C::Future: Send + 'static,
{
    type Stream = Bounded<C::Stream>;
    type Error = C::Error;
    type Future = BoxFuture<'static, Result<Self::Stream, C::Error>>;

    fn connect(self, stream: S) -> Self::Future {
        let exceeded = self.exceeded;
        Box::pin(self.connect.connect(stream).map_ok(|stream| Bounded::new(stream, exceeded)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, body: usize) -> Vec<u8> {
        let mut message = vec![kind];
        message.extend(u32::try_from(body + HEADER - 1).unwrap().to_be_bytes());
        message.resize(HEADER + body, 0);
        message
    }

    /// Counts the stream in pieces of several sizes, which must make no difference.
    fn count(stream: &[u8]) -> Result<(), Excess> {
        let [first, rest @ ..] = [1, 3, 4096, stream.len().max(1)].map(|size| {
            let mut meter = Meter::default();
            stream.chunks(size).try_for_each(|piece| meter.count(piece))
        });
        assert!(rest.iter().all(|other| *other == first), "{first:?} {rest:?}");
        first
    }

    #[test]
    fn the_login_the_messages_the_answers_and_their_rows_are_bounded() {
        let login = |parameters: usize| [message(b'S', 1000).repeat(parameters), message(READY, 1)].concat();
        assert_eq!(count(&login(65)), Ok(()));
        assert_eq!(count(&login(66)), Err(Excess::Login));
        let first = [login(0), message(ROW, 60_000), message(ROW, 6000)].concat();
        assert_eq!(count(&first), Err(Excess::Login), "the first answer, too");
        let after_login = |messages: &[u8]| count(&[&*login(0), &message(READY, 1), messages].concat());
        assert_eq!(after_login(&message(ROW, MESSAGE - 4)), Ok(()));
        assert_eq!(after_login(&message(ROW, MESSAGE - 3)), Err(Excess::Message(MESSAGE + 1)));
        assert_eq!(after_login(&message(b'N', MESSAGE - 5).repeat(2)), Ok(()));
        assert_eq!(after_login(&message(b'N', MESSAGE - 5).repeat(3)), Err(Excess::Answer));
        assert_eq!(after_login(&message(ROW, 2).repeat(ROWS)), Ok(()));
        assert_eq!(after_login(&message(ROW, 2).repeat(ROWS + 1)), Err(Excess::Rows));
        let two_answers = [message(ROW, 2).repeat(ROWS), message(READY, 1)].concat().repeat(2);
        assert_eq!(after_login(&two_answers), Ok(()), "each answer has its own bound");
    }

    #[test]
    fn what_is_no_message_ends_the_stream() {
        assert_eq!(count(b"HTTP/1.1 400 Bad Request\r\n"), Err(Excess::Message(0x5454_502f)));
        assert_eq!(count(&[0x15, 3, 3, 0, 2]), Err(Excess::Malformed), "a TLS alert");
        assert_eq!(count(&[b'S', 0, 0, 0, 3]), Err(Excess::Malformed), "a length that does not count itself");
        assert_eq!(count(&[b'S', 255, 255, 255, 255]), Err(Excess::Message(u32::MAX as usize)));
    }
}
