# shellcheck shell=bash
# One schema registry (Apicurio, with the Confluent-compatible API): its command
# line, when it is ready. What it holds is in memory and goes with the process.
# Sourced by scripts/brokers.

readonly REGISTRY_PATH=/apis/ccompat/v7

registry_ports() { # sets PORT
    PORT=$(free_ports 1)
}

registry_version() { echo "$REGISTRY_VERSION"; }

registry_write_files() { mkdir -p "$DIR/data"; }

registry_spawn() {
    local home=$infra/registry-$REGISTRY_VERSION
    spawn 0 :: java -Xms64m -Xmx256m \
        "-Dquarkus.http.port=$PORT" -Dquarkus.http.host=127.0.0.1 \
        -jar "$home/apicurio-registry-app-$REGISTRY_VERSION-runner.jar"
}

registry_ready() { net http "$PORT" "$REGISTRY_PATH/subjects"; }

registry_ctl() { fail "the registry has no tool of its own; ask it over HTTP at $REGISTRY_PATH"; }

registry_json() {
    printf '"management_port":null,"url":"http://127.0.0.1:%s%s","management_url":null,"tls_port":null,"sasl_port":null,"sasl_tls_port":null,"proxied_port":null,"tls_url":null' \
        "$PORT" "$REGISTRY_PATH"
}
