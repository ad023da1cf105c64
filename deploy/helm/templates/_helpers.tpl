{{- define "fleet.name" -}}
{{- if contains "cortex" .Release.Name }}{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else }}{{ printf "%s-cortex-neuron" .Release.Name | trunc 45 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "fleet.selector" -}}
app.kubernetes.io/name: cortex-neuron
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fleet.labels" -}}
{{ include "fleet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "fleet.secret" -}}
{{ .Values.secret.existing | default (include "fleet.name" .) }}
{{- end }}

{{- define "fleet.image" -}}
{{ printf "%s:%s" (required "set cortex.image.repository and neuron.image.repository to the images that you have built" .repository) (.tag | default .appVersion) }}
{{- end }}

{{- define "fleet.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "fleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}
