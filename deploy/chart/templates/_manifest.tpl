{{/* An object of a manifest in this release: labelled, and in its namespace. Takes the object and the root context. */}}
{{- define "ambient-mesh.place" -}}
{{- $object := index . 0 -}}
{{- $root := index . 1 -}}
{{- $_ := set $object.metadata "labels" (merge (dict "app.kubernetes.io/part-of" "ambient-mesh") ($object.metadata.labels | default dict)) -}}
{{- if $object.metadata.namespace -}}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace -}}
{{- end -}}
{{- range $object.subjects -}}
{{- $_ := set . "namespace" $root.Release.Namespace -}}
{{- end -}}
{{- end -}}

{{/* All objects of a manifest that nothing but their place changes. Takes the file's name and the root context. */}}
{{- define "ambient-mesh.objects" -}}
{{- $root := index . 1 -}}
{{- range regexSplit "(?m)^---$" ($root.Files.Get (index . 0)) -1 }}
{{- $object := fromYaml . }}
{{- include "ambient-mesh.place" (list $object $root) }}
---
{{ toYaml $object }}
{{- end }}
{{- end -}}

{{/* What both workloads are given in the same way. Takes the workload, its values, the root context, and environment from other values. */}}
{{- define "ambient-mesh.configure" -}}
{{- $workload := index . 0 -}}
{{- $values := index . 1 -}}
{{- $root := index . 2 -}}
{{- $environment := index . 3 -}}
{{- include "ambient-mesh.place" (list $workload $root) -}}
{{- $metadata := $workload.spec.template.metadata -}}
{{- $_ := set $metadata "labels" (mergeOverwrite $metadata.labels $values.podLabels) -}}
{{- $_ := set $metadata "annotations" (mergeOverwrite $metadata.annotations $values.podAnnotations) -}}
{{- $pod := $workload.spec.template.spec -}}
{{- $_ := set $pod "nodeSelector" (mergeOverwrite $pod.nodeSelector $values.nodeSelector) -}}
{{- with $values.affinity -}}{{- $_ := set $pod "affinity" . -}}{{- end -}}
{{- with $values.tolerations -}}{{- $_ := set $pod "tolerations" . -}}{{- end -}}
{{- with $root.Values.imagePullSecrets -}}{{- $_ := set $pod "imagePullSecrets" . -}}{{- end -}}
{{- $container := index $pod.containers 0 -}}
{{- $image := $root.Values.image -}}
{{- $_ := set $container "image" (printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion)) -}}
{{- with $image.pullPolicy -}}{{- $_ := set $container "imagePullPolicy" . -}}{{- end -}}
{{- with $values.resources -}}{{- $_ := set $container "resources" . -}}{{- end -}}
{{- with $root.Values.logLevel -}}{{- $_ := set $environment "RUST_LOG" . -}}{{- end -}}
{{- if $root.Values.logAsJson -}}{{- $_ := set $environment "LOG_FORMAT" "json" -}}{{- end -}}
{{- $environment = mergeOverwrite $environment $values.env -}}
{{- $given := list -}}
{{- range $container.env -}}
{{- if hasKey $environment .name -}}
{{- $given = append $given (dict "name" .name "value" (get $environment .name)) -}}
{{- $_ := unset $environment .name -}}
{{- else -}}
{{- $given = append $given . -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $environment -}}
{{- $given = append $given (dict "name" $name "value" $value) -}}
{{- end -}}
{{- $_ := set $container "env" $given -}}
{{- end -}}
