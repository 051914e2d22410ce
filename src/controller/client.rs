//! Requests to the API server: each with a timeout, a bound on how many run at once, and a count of those that fail.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::database::error::chain;
use crate::telemetry::http::Readiness;
use crate::telemetry::metrics::{Instruments, Operation};

/// The longest that one API request may take, its retries by the client included.
pub const API_TIMEOUT: Duration = Duration::from_secs(15);

/// The most requests under way at once. Each has a connection, with buffers: of very many objects that are due together,
/// those would be most of the memory, and a burst that the API server does not need.
pub const REQUEST_SLOTS: usize = 32;

/// How the API server begins a complaint about a field that its CRD does not know.
const STRICT: &str = "strict decoding error";

/// What the API server says when a status has a field that its CRD does not know.
const UNKNOWN_FIELD: &str = "unknown field";

/// An API request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("others kept writing the object at the same time")]
    Conflict,
    #[error("this replica lost the lead, and no other leads yet")]
    NoLeader,
    #[error("a bug in the operator; its log says where. Please report it")]
    Panic,
    #[error("{}", text(.0))]
    Kube(kube::Error),
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        Self::Kube(error)
    }
}

impl ApiError {
    /// Whether it counts as a failed request: that something is not there, or has changed, is an answer.
    pub fn is_failure(&self) -> bool {
        !matches!(self.code(), Some(404 | 409)) && !matches!(self, Self::Conflict | Self::NoLeader | Self::Panic)
    }

    /// The HTTP status code of the answer, if there was one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// What is missing, if no object's reconcile can succeed until somebody grants or installs it.
    fn missing(&self, operation: Operation, namespace: &str) -> Option<String> {
        let Self::Kube(kube::Error::Api(status)) = self else { return None };
        match (operation, status.code) {
            (Operation::GetObject, 403) => Some(format!("the right to get auditlogsweepers in namespace {namespace}")),
            (Operation::PatchStatus, 403) => {
                Some(format!("the right to patch auditlogsweepers/status in namespace {namespace}"))
            }
            (Operation::PatchStatus, _) if status.message.contains(UNKNOWN_FIELD) => Some(
                "the CustomResourceDefinition of this version, which `audit-log-sweeper crd` prints; an older one is installed"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// An error with its causes in one line. What the API server answered, without the dump of it that `kube` appends.
pub fn text(error: &(dyn Error + 'static)) -> String {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(kube::Error::Api(status)) = cause.downcast_ref() {
            // Before its complaint about a field it quotes the whole object, which is long and may hold what others annotated.
            let message = status.message.rfind(STRICT).map_or(&*status.message, |at| status.message.split_at(at).1);
            return format!("{message} (HTTP {})", status.code);
        }
        next = cause.source();
    }
    chain(error)
}

/// The way to the API server.
#[derive(Clone)]
pub struct ApiServer {
    pub client: Client,
    request_slots: Arc<Semaphore>,
    /// Counts the requests that fail.
    pub instruments: Instruments,
    /// Is told what the operator lacks.
    readiness: Readiness,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiServer")
    }
}

impl ApiServer {
    /// By way of this client.
    pub fn new(client: Client, instruments: Instruments, readiness: Readiness) -> Self {
        Self { client, request_slots: Arc::new(Semaphore::new(REQUEST_SLOTS)), instruments, readiness }
    }

    /// Waits for a request, but not for ever once it is sent, and counts it if it fails.
    pub async fn request<T>(
        &self,
        operation: Operation,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        // Nobody closes it. Whether the API server answers at all is asked without waiting for others.
        let _permit = match operation {
            Operation::Watch => None,
            _ => self.request_slots.acquire().await.ok(),
        };
        let answer = timeout(API_TIMEOUT, request).await.map_err(|_| ApiError::Timeout(API_TIMEOUT));
        let answer = answer.and_then(|answer| answer.map_err(ApiError::from));
        if answer.as_ref().is_err_and(ApiError::is_failure) {
            self.instruments.api_request_failed(operation);
        }
        answer
    }

    /// The same for a request without which no object of the namespace can be worked on: as long as a right to it, or
    /// a field of the CRD, is missing, the operator is not ready.
    pub async fn request_required<T>(
        &self,
        operation: Operation,
        namespace: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        let answer = self.request(operation, request).await;
        let part = format!("{} {namespace}", operation.as_str());
        match &answer {
            Ok(_) => self.readiness.set(&part, None),
            Err(error) => {
                if let Some(missing) = error.missing(operation, namespace) {
                    self.readiness.set(&part, Some(format!("{missing}: {error}")));
                }
            }
        }
        answer
    }

    /// Of a namespace in which an object turned out to be gone, nothing is known any more.
    pub fn forget(&self, namespace: &str) {
        self.readiness.set(&format!("{} {namespace}", Operation::PatchStatus.as_str()), None);
    }
}
