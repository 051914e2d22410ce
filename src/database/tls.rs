//! Encryption of the connection: libpq's modes in terms of rustls.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};

use super::Error;
use crate::api::spec::TlsMode;
use crate::credentials::Credentials;

/// The CAs to trust where the spec names none: those compiled in, or those in `pem` (of `SSL_CERT_FILE`).
///
/// # Errors
/// When `pem` holds no certificate.
pub fn default_roots(pem: Option<&[u8]>) -> Result<RootCertStore, Error> {
    match pem {
        Some(pem) => roots(pem),
        None => Ok(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }),
    }
}

/// The CAs in a PEM text.
pub(super) fn roots(pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|_| Error::Ca("it is not PEM"))?;
        store.add(certificate).map_err(|_| Error::Ca("it holds something that is not a certificate of a CA"))?;
    }
    if store.is_empty() {
        return Err(Error::Ca("it holds no certificate (-----BEGIN CERTIFICATE-----)"));
    }
    Ok(store)
}

/// The client side of a handshake in the given mode. As in libpq, a CA that is named is used: Require with one verifies
/// as VerifyCA does.
pub(super) fn client_config(
    mode: TlsMode,
    credentials: &Credentials,
    default_roots: &Arc<RootCertStore>,
) -> Result<ClientConfig, Error> {
    let named = credentials.ca.as_deref().map(roots).transpose()?.map(Arc::new);
    let mode = if mode == TlsMode::Require && named.is_some() { TlsMode::VerifyCA } else { mode };
    let roots = named.unwrap_or_else(|| default_roots.clone());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|_| Error::Ca("no protocol version in common"))?;
    let builder = match mode {
        TlsMode::VerifyFull => builder.with_root_certificates(roots),
        TlsMode::VerifyCA => {
            let chain = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|_| Error::Ca("it cannot be used to verify a server"))?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain: Some(chain), provider }))
        }
        TlsMode::Require | TlsMode::Disable => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain: None, provider }))
        }
    };
    let Some(client) = &credentials.client else { return Ok(builder.with_no_client_auth()) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&client.certificate).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    let chain = chain.ok_or(Error::ClientCertificate("tls.crt holds no certificate (-----BEGIN CERTIFICATE-----)"))?;
    // The causes may quote what was read.
    let key = PrivateKeyDer::from_pem_slice(&client.key).map_err(|_| {
        Error::ClientCertificate("tls.key holds no unencrypted private key (-----BEGIN PRIVATE KEY-----)")
    })?;
    builder.with_client_auth_cert(chain, key).map_err(|_| {
        Error::ClientCertificate(
            "tls.key is not the key of the first certificate in tls.crt, or of a kind that is not known here, or that \
             certificate is X.509 v1",
        )
    })
}

/// Verifies less than everything, as the user wrote: the chain without the host's name, or neither. The server must
/// still prove that it holds the key of the certificate it shows.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
