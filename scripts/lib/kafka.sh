# shellcheck shell=bash
# One Kafka node (KRaft, broker and controller in one): its files, its command
# line, when it is ready. Sourced by scripts/brokers.

kafka_ports() { # sets PORT CONTROLLER_PORT TLS_PORT SASL_PORT SASL_TLS_PORT PROXIED_PORT
    local ports
    mapfile -t ports < <(free_ports 6)
    PORT=${ports[0]} CONTROLLER_PORT=${ports[1]} TLS_PORT='' SASL_PORT='' SASL_TLS_PORT='' PROXIED_PORT=''
    ((!WITH_TLS)) || TLS_PORT=${ports[2]}
    ((!WITH_SASL)) || SASL_PORT=${ports[3]}
    ((!WITH_TLS || !WITH_SASL)) || SASL_TLS_PORT=${ports[4]}
    [[ -z $VIA ]] || PROXIED_PORT=${ports[5]}
}

kafka_version() { echo "$KAFKA_VERSION"; }

kafka_write_files() {
    local listeners="PLAINTEXT://127.0.0.1:$PORT" advertised name
    local login='org.apache.kafka.common.security.plain.PlainLoginModule required username="helixagent" password="helixagent123" user_helixagent="helixagent123";'
    [[ -z $TLS_PORT ]] || listeners+=",SSL://localhost:$TLS_PORT"
    [[ -z $SASL_PORT ]] || listeners+=",SASL_PLAINTEXT://127.0.0.1:$SASL_PORT"
    [[ -z $SASL_TLS_PORT ]] || listeners+=",SASL_SSL://localhost:$SASL_TLS_PORT"
    advertised=$listeners
    if [[ -n $PROXIED_PORT ]]; then
        # Who comes in here is sent on to the proxy for everything else.
        listeners+=",PROXIED://127.0.0.1:$PROXIED_PORT"
        advertised+=",PROXIED://127.0.0.1:$VIA"
    fi
    mkdir -p "$DIR/data"
    {
        cat <<TEXT
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$CONTROLLER_PORT
controller.listener.names=CONTROLLER
listeners=$listeners,CONTROLLER://127.0.0.1:$CONTROLLER_PORT
advertised.listeners=$advertised
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=PLAINTEXT
log.dirs=$DIR/data
num.partitions=1
offsets.topic.num.partitions=5
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=5
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=5
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
# Consumers of a test that was killed are thrown out quickly.
group.min.session.timeout.ms=1000
# Room for the topics whose limit is 10 MiB.
message.max.bytes=11534336
replica.fetch.max.bytes=16777216
socket.request.max.bytes=104857600
# After a kill -9 the controller waits for the old session of the broker to
# end before it lets the new one in.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
TEXT
        for name in ${TLS_PORT:+ssl} ${SASL_TLS_PORT:+sasl_ssl}; do
            cat <<TEXT
listener.name.$name.ssl.keystore.type=PEM
listener.name.$name.ssl.keystore.location=$DIR/tls/server-bundle.pem
listener.name.$name.ssl.truststore.type=PEM
listener.name.$name.ssl.truststore.location=$DIR/tls/ca.pem
listener.name.$name.ssl.client.auth=requested
TEXT
        done
        [[ -z $SASL_PORT ]] || echo "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"
        for name in ${SASL_PORT:+sasl_plaintext} ${SASL_TLS_PORT:+sasl_ssl}; do
            cat <<TEXT
listener.name.$name.plain.sasl.jaas.config=$login
listener.name.$name.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.$name.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
TEXT
        done
    } >"$DIR/server.properties"
    cat >"$DIR/log4j2.properties" <<'TEXT'
status=error
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %p %c{1} %m%n
rootLogger.level=warn
rootLogger.appenderRef.console.ref=console
logger.server.name=kafka.server.KafkaRaftServer
logger.server.level=info
TEXT
    if [[ ! -e $DIR/data/meta.properties ]]; then
        kafka_java -Xmx128m -XX:TieredStopAtLevel=1 -- kafka.tools.StorageTool format -t MkU3OEVBNTcwNTJENDM2Qg -c "$DIR/server.properties" \
            --add-scram 'SCRAM-SHA-256=[name=helixagent,password=helixagent123]' \
            --add-scram 'SCRAM-SHA-512=[name=helixagent,password=helixagent123]' >"$DIR/format.log" 2>&1 ||
            fail "kafka could not format its storage: $(tail -n 1 "$DIR/format.log")"
    fi
}

kafka_command() { # JVM-OPTION... -- CLASS ARGUMENT...: into the array KAFKA_COMMAND
    local options=()
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    KAFKA_COMMAND=(java "${options[@]}" "-Dlog4j2.configurationFile=$DIR/log4j2.properties"
        -cp "$infra/kafka-$KAFKA_VERSION/libs/*" "$@")
}

kafka_java() { kafka_command "$@" && "${KAFKA_COMMAND[@]}"; }

kafka_spawn() {
    kafka_command -Xms256m -Xmx512m -- kafka.Kafka "$DIR/server.properties"
    spawn 0 :: "${KAFKA_COMMAND[@]}"
}

kafka_ready() { net kafka "$PORT"; }

# ctl DIR CLASS ARGUMENT...: for example org.apache.kafka.tools.TopicCommand --list
kafka_ctl() {
    local class=$1
    shift
    kafka_java -Xmx256m -- "$class" --bootstrap-server "127.0.0.1:$PORT" "$@"
}

kafka_json() {
    printf '"management_port":null,"url":"127.0.0.1:%s","management_url":null,"tls_port":%s,"sasl_port":%s,"sasl_tls_port":%s,"proxied_port":%s,"tls_url":%s' \
        "$PORT" "${TLS_PORT:-null}" "${SASL_PORT:-null}" "${SASL_TLS_PORT:-null}" "${PROXIED_PORT:-null}" \
        "$([[ -n $TLS_PORT ]] && echo "\"localhost:$TLS_PORT\"" || echo null)"
}
