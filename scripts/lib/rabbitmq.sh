# shellcheck shell=bash
# One RabbitMQ node: its files, its command line, when it is ready. Sourced by
# scripts/brokers; reads the variables of the node's spec (see there).

# Salted SHA-256 of the passwords guest, helixagent123 and stage7password, as
# RabbitMQ stores them.
rabbitmq_definitions() {
    local name hash separator=
    echo '{"vhosts":[{"name":"/"}],"users":['
    while read -r name hash; do
        printf '%s{"name":"%s","password_hash":"%s","hashing_algorithm":"rabbit_password_hashing_sha256","tags":"administrator"}\n' "$separator" "$name" "$hash"
        separator=,
    done <<<"$RABBITMQ_USERS"
    echo '],"permissions":['
    separator=
    while read -r name hash; do
        printf '%s{"user":"%s","vhost":"/","configure":".*","write":".*","read":".*"}\n' "$separator" "$name"
        separator=,
    done <<<"$RABBITMQ_USERS"
    echo ']}'
}
readonly RABBITMQ_USERS="guest aHViIf8iX97cH0DfPE7Jh3CDxYDcxW7lE8PzoxXeGSSkG6b3
helixagent aHViIXdjP+fyuFOnxbaauvvcliT5SEHQ9M1wyB2SyMFNnX98
stage7 aHViIUDiHTyvLmiDZmWRxbxA4F+uwner/PSRfQLmZJ4YfuWJ"

rabbitmq_ports() { # sets PORT MANAGEMENT_PORT DIST_PORT EPMD_PORT TLS_PORT
    local ports
    mapfile -t ports < <(free_ports 5)
    PORT=${ports[0]} MANAGEMENT_PORT=${ports[1]} DIST_PORT=${ports[2]} EPMD_PORT=${ports[3]}
    TLS_PORT=
    ((!WITH_TLS)) || TLS_PORT=${ports[4]}
}

rabbitmq_version() {
    if [[ $ROOT == / ]]; then
        host_rabbitmq_version
    else
        sed -n '/^Package: rabbitmq-server$/,/^$/s/^Version: \([0-9.]*\).*/\1/p' "$ROOT/var/lib/dpkg/status"
    fi
}

rabbitmq_write_files() {
    # Inside a tree the node's folder is mounted at a fixed place.
    local at=$DIR
    [[ $ROOT == / ]] || at=/mnt/node
    mkdir -p "$DIR/home" "$DIR/mnesia" "$DIR/log"
    if [[ ! -e $DIR/home/.erlang.cookie ]]; then
        (umask 077 && printf 'MESSAGINGHUBTESTS' >"$DIR/home/.erlang.cookie")
        chmod 400 "$DIR/home/.erlang.cookie"
    fi
    rabbitmq_definitions >"$DIR/definitions.json"
    echo '[rabbitmq_management].' >"$DIR/enabled_plugins"
    : >"$DIR/rabbitmq-env.conf"
    {
        echo "listeners.tcp.1 = 127.0.0.1:$PORT"
        echo "management.tcp.ip = 127.0.0.1"
        echo "management.tcp.port = $MANAGEMENT_PORT"
        echo "load_definitions = $at/definitions.json"
        echo "loopback_users = none"
        echo "log.file = false"
        echo "log.console = true"
        echo "log.console.level = info"
        echo "disk_free_limit.absolute = 100MB"
        if ((WITH_TLS)); then
            echo "listeners.ssl.1 = 127.0.0.1:$TLS_PORT"
            echo "ssl_options.cacertfile = $at/tls/ca.pem"
            echo "ssl_options.certfile = $at/tls/server.pem"
            echo "ssl_options.keyfile = $at/tls/server.key"
            # A client certificate is checked when one is shown, not demanded.
            echo "ssl_options.verify = verify_peer"
            echo "ssl_options.fail_if_no_peer_cert = false"
        fi
    } >"$DIR/rabbitmq.conf"
    # Nothing of the caller's environment or the machine's own settings counts.
    {
        printf '%s\n' "PATH=/usr/sbin:/usr/bin:/sbin:/bin" "LANG=C.UTF-8" "LC_ALL=C.UTF-8" \
            "HOME=$at/home" "ERL_EPMD_PORT=$EPMD_PORT" "ERL_EPMD_ADDRESS=127.0.0.1" \
            "RABBITMQ_NODENAME=hub-$PORT@localhost" \
            "RABBITMQ_DIST_PORT=$DIST_PORT" "RABBITMQ_MNESIA_BASE=$at/mnesia" "RABBITMQ_LOG_BASE=$at/log" \
            "RABBITMQ_PID_FILE=$at/rabbitmq.pid" "RABBITMQ_ENABLED_PLUGINS_FILE=$at/enabled_plugins" \
            "RABBITMQ_CONFIG_FILE=$at/rabbitmq.conf" "RABBITMQ_CONF_ENV_FILE=$at/rabbitmq-env.conf" \
            "RABBITMQ_ADVANCED_CONFIG_FILE=$at/advanced.config"
    } >"$DIR/environment"
}

# inside COMMAND...: the words that run a command where this node lives, into
# the array INSIDE. The mounts belong to a namespace of the process's own, so
# they are gone when it is, however it ended.
inside() {
    local environment=()
    mapfile -t environment <"$DIR/environment"
    if [[ $ROOT == / ]]; then
        INSIDE=(env -i "${environment[@]}" "$@")
        return
    fi
    local map=()
    [[ $(id -u) == 0 ]] || map=(--map-root-user)
    # shellcheck disable=SC2016
    INSIDE=(unshare "${map[@]}" --mount --propagation private /bin/sh -ec
        'root=$1; dir=$2; shift 2
         mount --rbind /proc "$root/proc"
         mount --rbind /dev "$root/dev"
         mount --bind "$dir" "$root/mnt/node"
         exec chroot "$root" "$@"' sh "$ROOT" "$DIR" /usr/bin/env -i "${environment[@]}" "$@")
}

rabbitmq_spawn() {
    local epmd
    inside epmd -port "$EPMD_PORT" -address 127.0.0.1
    epmd=("${INSIDE[@]}")
    # With this variable the start script becomes the server instead of
    # watching over it, so that its pid is the server's.
    inside env RUNNING_UNDER_SYSTEMD=true /usr/lib/rabbitmq/bin/rabbitmq-server
    spawn "$EPMD_PORT" "${epmd[@]}" :: "${INSIDE[@]}"
}

rabbitmq_ready() {
    net amqp "$PORT" && net http "$MANAGEMENT_PORT" /api/whoami
}

rabbitmq_ctl() {
    inside rabbitmqctl -n "hub-$PORT@localhost" "$@"
    # The wrapper in /usr/sbin changes the user, who cannot read our cookie.
    local i
    for i in "${!INSIDE[@]}"; do
        [[ ${INSIDE[i]} != rabbitmqctl ]] || INSIDE[i]=/usr/lib/rabbitmq/bin/rabbitmqctl
    done
    "${INSIDE[@]}"
}

rabbitmq_json() {
    printf '"management_port":%s,"url":"amqp://guest:guest@127.0.0.1:%s/%%2f","management_url":"http://127.0.0.1:%s","tls_port":%s,"sasl_port":null,"sasl_tls_port":null,"proxied_port":null,"tls_url":%s' \
        "$MANAGEMENT_PORT" "$PORT" "$MANAGEMENT_PORT" "${TLS_PORT:-null}" \
        "$([[ -n $TLS_PORT ]] && echo "\"amqps://guest:guest@localhost:$TLS_PORT/%2f\"" || echo null)"
}
