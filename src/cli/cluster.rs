//! The user's way to the cluster: kubeconfig in, AuditLogSweepers and Secrets out. Every request has a timeout, and every
//! failure says what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hyper_util::client::proxy::matcher::Matcher;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::Value;
use tokio::time::timeout;

use crate::api::AuditLogSweeper;
use crate::database::error::chain;

/// The longest that one request may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The name under which fields belong to whoever uses the command line.
const MANAGER: &str = "kubectl-sweeper";

/// Objects are called by these names in errors, as RBAC has them.
const SWEEPERS: &str = "auditlogsweepers.auditlog.dev";

/// Which cluster and namespace, as kubectl's users say it.
#[derive(Debug, Args)]
pub struct ClusterArgs {
    /// Namespace to look in [default: that of the kubeconfig's context]
    #[arg(short, long, value_parser = super::names::label)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long)]
    pub context: Option<String>,
    /// Kubeconfig file [default: KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

/// Why the cluster could not be asked, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(
        "cannot find a cluster: {0}; set KUBECONFIG or --kubeconfig to a kubeconfig file, and see \
         `kubectl config get-contexts` for --context"
    )]
    NoCluster(String),
    #[error("the API server {url} did not answer within {TIMEOUT:?}; see whether `kubectl get --raw /readyz` does")]
    Timeout { url: String },
    #[error(
        "cannot reach the API server {url}: {cause}; check the network, a VPN, and --context: `kubectl cluster-info`"
    )]
    Unreachable { url: String, cause: String },
    #[error("the API server {url} does not know you: log in again, or check the user of the kubeconfig's context")]
    Unauthorized { url: String },
    #[error(
        "you may not {verb} {resource} {place}; ask for a role that allows it: `kubectl auth can-i {verb} {resource}`"
    )]
    Forbidden { verb: &'static str, resource: &'static str, place: String },
    #[error(
        "the cluster has no AuditLogSweepers: the CustomResourceDefinition is not installed (helm install \
         audit-log-sweeper, or kubectl apply --server-side -f manifests/install.yaml), or --context is another cluster"
    )]
    NotInstalled,
    #[error("there is no AuditLogSweeper {name} in namespace {namespace}{near}")]
    NoObject { name: String, namespace: String, near: String },
    #[error("AuditLogSweeper {name} in namespace {namespace} was deleted; a sweep of it that ran was ended")]
    Gone { name: String, namespace: String },
    #[error("there is no Secret {name} in namespace {namespace}; create it, or name another in the spec")]
    NoSecret { name: String, namespace: String },
    #[error("the API server refused to {verb} {resource}: {message}")]
    Refused { verb: &'static str, resource: &'static str, message: String, code: u16 },
}

impl ClusterError {
    /// The exit code: 2 if what the user said is wrong, else 1.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoCluster(_) | Self::NoObject { .. } => 2,
            _ => 1,
        }
    }

    /// Whether the same request may succeed a little later.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Unreachable { .. } => true,
            Self::Refused { code, .. } => *code == 429 || *code >= 500,
            _ => false,
        }
    }
}

impl From<KubeconfigError> for ClusterError {
    fn from(error: KubeconfigError) -> Self {
        Self::NoCluster(chain(&error))
    }
}

/// A cluster, and the namespace to look in.
pub struct Cluster {
    client: Client,
    url: String,
    pub namespace: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({})", self.url)
    }
}

/// What a KUBECONFIG of several files holds, of those that are there, as kubectl takes it. None: it names one, or none.
fn several() -> Result<Option<Kubeconfig>, KubeconfigError> {
    let listed = std::env::var_os("KUBECONFIG").unwrap_or_default();
    let paths: Vec<PathBuf> = std::env::split_paths(&listed).collect();
    if paths.len() < 2 {
        return Ok(None);
    }
    let mut whole = None;
    for path in paths.iter().filter(|path| path.is_file()) {
        let next = Kubeconfig::read_from(path)?;
        whole = Some(whole.map_or(Ok(next.clone()), |whole: Kubeconfig| whole.merge(next))?);
    }
    Ok(whole)
}

/// Does without a proxy that the environment names where NO_PROXY excepts the cluster; kube looks for the proxy's own host
/// there.
pub fn choose_proxy(config: &mut Config) {
    let of_environment =
        ["HTTPS_PROXY", "https_proxy"].iter().filter_map(|name| std::env::var(name).ok()?.parse().ok());
    let named = of_environment.into_iter().any(|proxy| Some(&proxy) == config.proxy_url.as_ref());
    if named && Matcher::from_env().intercept(&config.cluster_url).is_none() {
        config.proxy_url = None;
    }
}

impl Cluster {
    /// Reads the kubeconfig, or in a pod its service account. Asks nothing yet.
    ///
    /// # Errors
    /// When there is none, or it cannot be used.
    pub async fn connect(args: &ClusterArgs) -> Result<Self, ClusterError> {
        let options = KubeConfigOptions { context: args.context.clone(), ..KubeConfigOptions::default() };
        let named =
            args.kubeconfig.as_ref().map(Kubeconfig::read_from).or_else(|| several().transpose()).transpose()?;
        let mut config = match named {
            Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &options).await?,
            None => match Config::from_kubeconfig(&options).await {
                Ok(config) => config,
                // In a pod there is no kubeconfig; whoever names a context means one.
                Err(error) if args.context.is_some() => return Err(error.into()),
                Err(error) => Config::incluster().map_err(|_| ClusterError::from(error))?,
            },
        };
        choose_proxy(&mut config);
        let (url, namespace) = (config.cluster_url.to_string(), config.default_namespace.clone());
        let namespace = args.namespace.clone().unwrap_or(namespace);
        let client = Client::try_from(config).map_err(|error| ClusterError::NoCluster(chain(&error)))?;
        Ok(Self { client, url, namespace })
    }

    /// An AuditLogSweeper, whatever is in it.
    ///
    /// # Errors
    /// When it is not there, or the cluster does not tell.
    pub async fn get(&self, name: &str) -> Result<DynamicObject, ClusterError> {
        let api = self.sweepers(false);
        let found = self.ask("get", SWEEPERS, Some(&self.namespace), api.get(name)).await;
        self.or_missing(name, found).await
    }

    /// The AuditLogSweepers of the namespace, or of all, in the order of their names.
    ///
    /// # Errors
    /// When the cluster does not tell.
    pub async fn list(&self, everywhere: bool) -> Result<Vec<DynamicObject>, ClusterError> {
        let place = (!everywhere).then_some(self.namespace.as_str());
        let (api, all) = (self.sweepers(everywhere), ListParams::default());
        let listed = self.ask("list", SWEEPERS, place, api.list(&all)).await;
        let mut items = match listed {
            Ok(list) => list.items,
            // A namespace that is not there has an empty list.
            Err(ClusterError::Refused { code: 404, .. }) => return Err(ClusterError::NotInstalled),
            Err(error) => return Err(error),
        };
        items.sort_by_key(|object| (object.namespace(), object.name_any()));
        Ok(items)
    }

    /// Changes an AuditLogSweeper by a merge patch.
    ///
    /// # Errors
    /// When it is not there, or the cluster does not take it.
    pub async fn patch(&self, name: &str, patch: &Value) -> Result<DynamicObject, ClusterError> {
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let (api, patch) = (self.sweepers(false), Patch::Merge(patch));
        let patched = self.ask("patch", SWEEPERS, Some(&self.namespace), api.patch(name, &params, &patch)).await;
        self.or_missing(name, patched).await
    }

    /// A Secret of the namespace.
    ///
    /// # Errors
    /// When it is not there, or the cluster does not tell.
    pub async fn secret(&self, name: &str) -> Result<Secret, ClusterError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let found = self.ask("get", "secrets", Some(&self.namespace), api.get_opt(name)).await?;
        found.ok_or_else(|| ClusterError::NoSecret { name: name.into(), namespace: self.namespace.clone() })
    }

    fn sweepers(&self, everywhere: bool) -> Api<DynamicObject> {
        let kind = ApiResource::erase::<AuditLogSweeper>(&());
        if everywhere {
            Api::all_with(self.client.clone(), &kind)
        } else {
            Api::namespaced_with(self.client.clone(), &self.namespace, &kind)
        }
    }

    /// Says of an object that is not there why: the kind is not, or the name is another.
    async fn or_missing<T>(&self, name: &str, answer: Result<T, ClusterError>) -> Result<T, ClusterError> {
        let Err(ClusterError::Refused { code: 404, .. }) = answer else { return answer };
        let names = match self.list(false).await {
            Ok(objects) => objects.iter().map(ResourceExt::name_any).collect(),
            Err(ClusterError::NotInstalled) => return Err(ClusterError::NotInstalled),
            // Who may not list them is told no more.
            Err(_) => vec![],
        };
        Err(ClusterError::NoObject { name: name.into(), namespace: self.namespace.clone(), near: near(name, &names) })
    }

    async fn ask<T>(
        &self,
        verb: &'static str,
        resource: &'static str,
        namespace: Option<&str>,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        let url = || self.url.clone();
        let answer = timeout(TIMEOUT, request).await.map_err(|_| ClusterError::Timeout { url: url() })?;
        answer.map_err(|error| match error {
            kube::Error::Api(status) => match status.code {
                401 => ClusterError::Unauthorized { url: url() },
                403 => {
                    let place =
                        namespace.map_or_else(|| "in all namespaces".into(), |name| format!("in namespace {name}"));
                    ClusterError::Forbidden { verb, resource, place }
                }
                code => ClusterError::Refused { verb, resource, message: status.message.trim().to_owned(), code },
            },
            error => ClusterError::Unreachable { url: url(), cause: chain(&error) },
        })
    }
}

/// The end of a sentence that says which names there are: the nearest, else the first few.
fn near(name: &str, names: &[String]) -> String {
    if names.is_empty() {
        return "; name another with --namespace, or look in all with `kubectl get als -A`".into();
    }
    let mut likely: Vec<_> = names.iter().map(|other| (strsim::jaro_winkler(name, other), other.as_str())).collect();
    likely.retain(|(likeness, _)| *likeness > 0.8);
    likely.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    let named = |names: &[&str]| names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    if likely.is_empty() {
        let more = if names.len() > 5 { ", ..." } else { "" };
        format!("; there are: {}{more}", named(&names.iter().map(String::as_str).collect::<Vec<_>>()))
    } else {
        format!("; is it {}?", named(&likely.iter().map(|(_, name)| *name).collect::<Vec<_>>()))
    }
}

/// Reads the name of an object, also as `als/NAME`, the way kubectl's users write it.
///
/// # Errors
/// When no object can have that name.
pub fn name(text: &str) -> Result<String, String> {
    let name = match text.split_once('/') {
        Some(("als" | "auditlogsweeper" | "auditlogsweepers" | SWEEPERS, name)) => name,
        _ => text,
    };
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if name.len() <= 253 && name.chars().all(fits) && name.starts_with(ends) && name.ends_with(ends) {
        Ok(name.into())
    } else {
        Err("no object can have this name: at most 253 small letters, digits, - and . only".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_as_kubectls_users_write_it() {
        for text in ["app", "als/app", "auditlogsweeper/app", "auditlogsweepers.auditlog.dev/app"] {
            assert_eq!(name(text), Ok("app".into()), "{text}");
        }
        for text in ["", "App", "als/", "pod/app", "../x", "a/b", "-a", "a\u{1b}", &"a".repeat(254)] {
            assert!(name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_wrong_name_is_answered_by_the_nearest_or_by_what_there_is() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(near("ordres", &names(&["billing", "orders", "orders-eu"])), "; is it orders, orders-eu?");
        assert_eq!(near("x", &names(&["a", "b", "c", "d", "e", "f"])), "; there are: a, b, c, d, e, ...");
        assert!(near("x", &[]).contains("--namespace"));
    }

    #[test]
    fn what_the_user_said_wrong_exits_with_2() {
        let place = || "x".to_owned();
        assert_eq!(ClusterError::NoCluster(place()).exit_code(), 2);
        assert_eq!(ClusterError::NoObject { name: place(), namespace: place(), near: place() }.exit_code(), 2);
        assert_eq!(ClusterError::NotInstalled.exit_code(), 1);
        assert_eq!(ClusterError::Gone { name: place(), namespace: place() }.exit_code(), 1);
        assert!(ClusterError::Timeout { url: place() }.may_pass() && !ClusterError::NotInstalled.may_pass());
        assert_eq!(ClusterError::Forbidden { verb: "get", resource: "secrets", place: place() }.exit_code(), 1);
    }
}
