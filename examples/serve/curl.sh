#!/bin/sh
# Restore a clip with curl: submit, poll, save. Usage: curl.sh CLIP OUTPUT [HEIGHT]
#
# CLIP is a link, or a path under the server's input folder. Needs curl and jq. On RunPod, set
#   ENDPOINT_URL=https://api.runpod.ai/v2/<endpoint id>  and  SEEDPOD_API_KEY=<your RunPod key>
set -eu

url=${ENDPOINT_URL:-http://127.0.0.1:8000}
key=${SEEDPOD_API_KEY:-none}
clip=$1 output=$2 height=${3:-1080}

call() { # call METHOD PATH [BODY]: the answer on stdout; an error ends the script, with the answer on stderr
    answer=$(curl -sS --fail-with-body -X "$1" "$url/$2" -H "Authorization: Bearer $key" \
        -H 'Content-Type: application/json' ${3:+--data "$3"}) || { echo "$answer" >&2; exit 1; }
    printf '%s\n' "$answer"
}

case $clip in
    http://* | https://*) kind=url ;;
    *) kind=path ;;
esac
body=$(jq -cn --arg kind "$kind" --arg clip "$clip" --argjson height "$height" \
    '{input: {task: "restore", source: {($kind): $clip}, height: $height}}')

submitted=$(call POST run "$body")
id=$(echo "$submitted" | jq -r .id)
trap 'call POST "cancel/$id" >/dev/null; exit 130' INT TERM
while
    status=$(call GET "status/$id")
    state=$(echo "$status" | jq -r .status)
    [ "$state" = IN_QUEUE ] || [ "$state" = IN_PROGRESS ]
do
    echo "$status" | jq -r '.status + (.output.percent? // empty | " \(.) %")' >&2
    sleep 1
done
if [ "$state" != COMPLETED ]; then
    echo "$status" | jq -r '.status, .error' >&2
    exit 1
fi

result=$(echo "$status" | jq .output.result)
case $(echo "$result" | jq -r .kind) in
    inline) echo "$result" | jq -r .base64 | base64 -d > "$output" ;;
    bucket) curl -sS --fail -o "$output" "$(echo "$result" | jq -r .url)" ;;
    path) echo "in the server's output folder: $(echo "$result" | jq -r .path)" ;;
esac
