//! A Kubernetes control plane without nodes: etcd and the API server, with RBAC and an audit log. Pods are stored and never run.

use crate::certificates::Authority;
use crate::leaks;
use crate::process::{Process, Program};
use crate::scratch::Scratch;
use crate::tools::Tools;
use crate::{free_port, random_hex, start_once};
use anyhow::Context;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// What tests count: how often the resource and the Secrets that it names were asked for; and what is searched for
/// secrets: all that is written into the resource and into events. All else would bury it.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Request
    verbs: [create, update, patch]
    resources: [{group: auditlog.dev}, {group: events.k8s.io}]
  - level: Metadata
    resources: [{group: auditlog.dev}, {group: '', resources: [secrets]}]
  - level: None
";

/// Other tests may keep the machine busy meanwhile.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(120);

/// The one that the tests of this process share. It cannot be stopped: who wants that starts one of its own.
pub fn shared() -> &'static ControlPlane {
    static SHARED: OnceLock<Result<ControlPlane, String>> = OnceLock::new();
    start_once(&SHARED, || async { ControlPlane::start(&Tools::ensure()?).await })
}

/// Everything ends with it; the order of the fields is the order in which it does.
pub struct ControlPlane {
    api_server: Option<Process>,
    etcd: Option<Process>,
    scratch: Scratch,
    tools: Tools,
    /// How they were started, to start them again.
    program: Program,
    etcd_program: Program,
    url: String,
    ca_pem: String,
    admin_token: String,
    admin_kubeconfig: PathBuf,
    audit_log: PathBuf,
}

impl ControlPlane {
    /// Starts it and waits until it is ready, about 3 s.
    pub async fn start(tools: &Tools) -> anyhow::Result<ControlPlane> {
        let mut tries = 1;
        loop {
            match Self::try_start(tools).await {
                // A free port may be taken by another before we have it.
                Err(error) if tries < 3 && format!("{error:#}").contains("address already in use") => tries += 1,
                result => return result,
            }
        }
    }

    async fn try_start(tools: &Tools) -> anyhow::Result<ControlPlane> {
        let scratch = Scratch::new(None)?;
        let (clients, peers) =
            (format!("http://127.0.0.1:{}", free_port()?), format!("http://127.0.0.1:{}", free_port()?));
        let etcd_program = Program::new("etcd", &tools.etcd)
            .arg(format!("--data-dir={}", scratch.path().join("etcd").display()))
            .arg(format!("--listen-client-urls={clients}"))
            .arg(format!("--advertise-client-urls={clients}"))
            .arg(format!("--listen-peer-urls={peers}"))
            .arg(format!("--initial-advertise-peer-urls={peers}"))
            .arg(format!("--initial-cluster=default={peers}"))
            .arg("--unsafe-no-fsync");
        let etcd = Some(etcd_program.start(&scratch)?);

        let authority = Authority::new("audit-log-sweeper control plane")?;
        let identity = authority.server(&["localhost", "127.0.0.1"])?;
        let service_accounts = authority.client("service accounts")?;
        let admin_token = random_hex();
        let port = free_port()?;
        let audit_log = match leaks::folder() {
            Some(folder) => folder.join(format!("audit-{}.log", random_hex())),
            None => scratch.path().join("audit.log"),
        };
        let flag = |flag: &str, name: &str, contents: &str| {
            let path = scratch.write(name, contents, None)?;
            anyhow::Ok(format!("--{flag}={}", path.display()))
        };
        // It keeps its state in etcd alone, and a polite end can take it long.
        let program =
            Program { grace: Duration::from_secs(5), ..Program::new("kube-apiserver", &tools.kube_apiserver) }
                .arg(format!("--etcd-servers={clients}"))
                .arg("--bind-address=127.0.0.1")
                .arg("--advertise-address=127.0.0.1")
                // No Service leads to it: there are no pods to use one, and loopback may not be an endpoint.
                .arg("--endpoint-reconciler-type=none")
                .arg(format!("--secure-port={port}"))
                .arg(flag("tls-cert-file", "server.crt", &identity.certificate_pem)?)
                .arg(flag("tls-private-key-file", "server.key", &identity.key_pem)?)
                .arg("--authorization-mode=RBAC")
                .arg(flag("token-auth-file", "tokens.csv", &format!("{admin_token},admin,admin,\"system:masters\"\n"))?)
                .arg("--service-account-issuer=https://kubernetes.default.svc")
                .arg(flag("service-account-signing-key-file", "service-accounts.key", &service_accounts.key_pem)?)
                .arg(flag("service-account-key-file", "service-accounts.crt", &service_accounts.certificate_pem)?)
                .arg("--service-cluster-ip-range=10.96.0.0/16")
                .arg(flag("audit-policy-file", "audit-policy.yaml", AUDIT_POLICY)?)
                .arg(format!("--audit-log-path={}", audit_log.display()))
                .arg("--audit-log-mode=blocking")
                // One file, whole: a log that is rotated would look like requests that were never made.
                .arg("--audit-log-maxsize=100000");
        scratch.write("ca.crt", authority.pem(), None)?;

        let mut started = ControlPlane {
            api_server: None,
            etcd,
            tools: tools.clone(),
            program,
            etcd_program,
            url: format!("https://127.0.0.1:{port}"),
            ca_pem: authority.pem(),
            admin_kubeconfig: PathBuf::new(),
            admin_token,
            audit_log,
            scratch,
        };
        started.admin_kubeconfig = started.kubeconfig_for(&started.admin_token, "admin")?;
        started.start_api_server().await?;
        Ok(started)
    }

    /// Asks the API server to end and waits for it; etcd keeps what it stored.
    pub fn stop_api_server(&mut self) {
        self.api_server = None;
    }

    /// Stops etcd and starts it again; the API server runs on, and is ready again when this returns.
    pub async fn restart_etcd(&mut self) -> anyhow::Result<()> {
        self.etcd = None;
        self.etcd = Some(self.etcd_program.start(&self.scratch)?);
        let (client, end) = (self.client().await?, Instant::now() + STARTUP_TIMEOUT);
        while let Err(error) = ready(&client).await {
            if Instant::now() > end {
                return Err(error.context("kube-apiserver does not find etcd again"));
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Starts it on the same port as before and waits until it is ready.
    pub async fn start_api_server(&mut self) -> anyhow::Result<()> {
        let mut process = self.program.start(&self.scratch)?;
        let (client, end) = (self.client().await?, Instant::now() + STARTUP_TIMEOUT);
        while let Err(error) = ready(&client).await {
            process.check()?;
            if let Some(etcd) = &mut self.etcd {
                etcd.check()?;
            }
            if Instant::now() > end {
                return Err(error.context(format!(
                    "kube-apiserver is not ready after {STARTUP_TIMEOUT:?}; its log:\n{}",
                    process.log_tail(20)
                )));
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.api_server = Some(process);
        Ok(())
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Of a user whom RBAC refuses nothing.
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// The administrator's; for its owner only.
    pub fn kubeconfig(&self) -> &Path {
        &self.admin_kubeconfig
    }

    /// Writes a kubeconfig for the bearer of the token. JSON, which every reader of YAML reads.
    pub fn kubeconfig_for(&self, token: &str, name: &str) -> anyhow::Result<PathBuf> {
        let config = self.config(token, name).to_string();
        self.scratch.write(&format!("{name}.kubeconfig"), config, None)
    }

    fn config(&self, token: &str, name: &str) -> Value {
        let cluster = json!({"server": self.url, "certificate-authority": self.scratch.path().join("ca.crt")});
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "audit-log-sweeper", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": "audit-log-sweeper", "user": name}}],
            "current-context": name,
        })
    }

    /// A new one for every call: a client is tied to the runtime that it was made in.
    pub async fn client(&self) -> anyhow::Result<Client> {
        self.client_for(&self.admin_token).await
    }

    pub async fn client_for(&self, token: &str) -> anyhow::Result<Client> {
        let kubeconfig = Kubeconfig::from_yaml(&self.config(token, "client").to_string())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    /// A token of the service account, good for a day, as a pod of it would get one.
    pub async fn service_account_token(&self, namespace: &str, name: &str) -> anyhow::Result<String> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let spec = TokenRequestSpec { expiration_seconds: Some(24 * 60 * 60), ..Default::default() };
        let request = TokenRequest { spec, ..Default::default() };
        let answer = accounts.create_token_request(name, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| format!("no token for service account {namespace}/{name}"))?;
        Ok(answer.status.context("the token request was not answered")?.token)
    }

    /// kubectl as the administrator, with no trace in the user's home folder.
    pub fn kubectl(&self) -> Command {
        let mut kubectl = Command::new(&self.tools.kubectl);
        kubectl.env("KUBECONFIG", &self.admin_kubeconfig).env("KUBECACHEDIR", self.scratch.path().join("kubectl"));
        kubectl
    }

    /// Helm as the administrator, with no trace in the user's home folder.
    pub fn helm(&self) -> Command {
        let home = self.scratch.path().join("helm");
        let mut helm = Command::new(&self.tools.helm);
        // Not kubectl's cache: `kubectl explain` would believe what Helm saw before it installed a new type.
        helm.env("KUBECONFIG", &self.admin_kubeconfig).env("KUBECACHEDIR", home.join("kube"));
        helm.env("HELM_CACHE_HOME", home.join("cache")).env("HELM_CONFIG_HOME", home.join("config"));
        helm.env("HELM_DATA_HOME", home.join("data"));
        helm
    }

    /// Where every request for the resource, its events and for Secrets is written, one line of JSON each, before it is
    /// answered.
    pub fn audit_log(&self) -> &Path {
        &self.audit_log
    }

    /// Every request so far for the resource and for Secrets, oldest first.
    pub fn audit_events(&self) -> anyhow::Result<Vec<Value>> {
        let log = fs::read_to_string(&self.audit_log).context("the audit log cannot be read")?;
        // The last line may be half written.
        let whole = &log[..log.rfind('\n').map_or(0, |end| end + 1)];
        Ok(whole.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }
}

/// Ready for all, and with the namespace that everybody takes for granted, which is made a moment later.
async fn ready(client: &Client) -> anyhow::Result<()> {
    let asked = async {
        client.request_text(Request::new("/readyz").list(&Default::default())?).await?;
        Api::<Namespace>::all(client.clone()).get("default").await?;
        anyhow::Ok(())
    };
    // An API server that is starting may accept a connection and not answer.
    timeout(Duration::from_secs(5), asked).await?
}
