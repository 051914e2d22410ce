{{/* The release's name if it tells the chart's, else both. */}}
{{- define "audit-log-sweeper.fullname" -}}
{{- $name := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if not (contains .Chart.Name $name) -}}
{{- $name = printf "%s-%s" $name .Chart.Name -}}
{{- end -}}
{{- $name | replace "." "-" | trunc 56 | trimSuffix "-" -}}
{{- end -}}

{{/* What releases have in common places: of the same name in another namespace, one must not take the rights of the other. */}}
{{- define "audit-log-sweeper.rights" -}}
{{- printf "%s:%s" (include "audit-log-sweeper.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- define "audit-log-sweeper.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "audit-log-sweeper.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | required "serviceAccount.name is required when serviceAccount.create is false" -}}
{{- end -}}
{{- end -}}

{{- define "audit-log-sweeper.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* What never changes in a release: a Deployment's selector is immutable. */}}
{{- define "audit-log-sweeper.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "audit-log-sweeper.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "audit-log-sweeper.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* What the operator may do where it works; a ClusterRole or Roles. */}}
{{- define "audit-log-sweeper.rules" -}}
- apiGroups: [auditlog.dev]
  resources: [auditlogsweepers]
  verbs: [get, list, watch]
- apiGroups: [auditlog.dev]
  resources: [auditlogsweepers/status]
  verbs: [patch]
# Any Secret by its name, since AuditLogSweepers name them; never listed or watched.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
# Best effort: sweeps go on without it.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end -}}

{{/* The paths of the fields that the schema "installed" has and the schema "ours" has not, each with a blank before it. */}}
{{- define "audit-log-sweeper.unknownFields" -}}
{{- $ours := get .ours "properties" | default dict -}}
{{- range $name, $installed := get .installed "properties" | default dict -}}
{{- $path := printf "%s.%s" $.path $name -}}
{{- if hasKey $ours $name -}}
{{- include "audit-log-sweeper.unknownFields" (dict "path" $path "installed" $installed "ours" (get $ours $name)) -}}
{{- else }} {{ $path }}{{ end -}}
{{- end -}}
{{- if and (hasKey .installed "items") (hasKey .ours "items") -}}
{{- include "audit-log-sweeper.unknownFields" (dict "path" (printf "%s[]" .path) "installed" .installed.items "ours" .ours.items) -}}
{{- end -}}
{{- end -}}

{{- define "audit-log-sweeper.subjects" -}}
- kind: ServiceAccount
  name: {{ include "audit-log-sweeper.serviceAccountName" . }}
  namespace: {{ .Release.Namespace | quote }}
{{- end -}}

{{/* What a container may do under the Pod Security Standard "restricted", and less. */}}
{{- define "audit-log-sweeper.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
