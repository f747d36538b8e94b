# shellcheck shell=bash
# How each server gets onto this machine. Sourced by scripts/brokers. Every
# step looks first whether it is needed, so that a second run does nothing.

readonly KAFKA_VERSION=4.1.0
readonly LOG4J_VERSION=2.24.3
readonly REGISTRY_VERSION=3.0.9
readonly RABBITMQ_RELEASE_3_10=bookworm
readonly RABBITMQ_RELEASE_4=trixie

as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        fail "needs root for: $* (run it as root, or install what is missing yourself)"
    fi
}

# apt_install PACKAGE...: those that are not there yet.
apt_install() {
    local package missing=()
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || fail "this system has no apt-get; please install: ${missing[*]}"
    note "installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive bash -c '
        set -e
        options=(-qq -o DPkg::Lock::Timeout=300)
        # A service must not start by itself: it would sit on the default port.
        policy=/usr/sbin/policy-rc.d made=
        if [[ ! -e $policy ]]; then
            printf "#!/bin/sh\nexit 101\n" >"$policy" && chmod 755 "$policy" && made=1
        fi
        trap "[[ -z \$made ]] || rm -f $policy" EXIT
        apt-get "${options[@]}" install -y --no-install-recommends "$@" ||
            { apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --no-install-recommends "$@"; }
    ' apt_install "${missing[@]}" >"$infra/apt.log" 2>&1 ||
        fail "apt-get could not install ${missing[*]}; its output is in $infra/apt.log: $(tail -n 1 "$infra/apt.log")"
}

host_rabbitmq_version() { dpkg-query -W -f '${Version}' rabbitmq-server 2>/dev/null | sed -n 's/^\([0-9.]*\).*/\1/p'; }

# rabbitmq_root SERIES: prints where that series lives ("/" is this system).
rabbitmq_root() {
    local series=$1 host
    host=$(host_rabbitmq_version || true)
    if [[ $host == "$series".* ]]; then
        echo /
    else
        echo "$infra/rabbitmq-$series"
    fi
}

# A Debian release in a folder, for a server that this system does not offer.
install_tree() { # SERIES RELEASE
    local tree=$infra/rabbitmq-$1 try=$infra/.rabbitmq-$1.new
    [[ -e $tree/.complete ]] && return 0
    apt_install debootstrap
    [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || apt_install debian-archive-keyring
    note "making a $2 tree for RabbitMQ $1 (half a minute)"
    as_root rm -rf "$try"
    as_root debootstrap --variant=minbase --include=rabbitmq-server "$2" "$try" \
        "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$infra/debootstrap-$1.log" 2>&1 ||
        fail "debootstrap failed; see $infra/debootstrap-$1.log: $(tail -n 1 "$infra/debootstrap-$1.log")"
    as_root bash -c '
        grep -qs "^127.0.0.1.*localhost" "$1/etc/hosts" || echo "127.0.0.1 localhost" >>"$1/etc/hosts"
        mkdir -p "$1/mnt/node"
        rm -rf "$1"/var/cache/apt/archives/*.deb
        touch "$1/.complete"
        mv "$1" "$2"
    ' install_tree "$try" "$tree"
}

install_rabbitmq_310() {
    local offered mapper_ran=0
    is_installed rabbitmq-3.10 && return 0
    offered=$(apt-cache madison rabbitmq-server 2>/dev/null | awk 'NR == 1 { print $3 }') || true
    # Another version here would be of no use, and its service a nuisance.
    if [[ $offered == 3.10.* || (-z $offered && $(cat /etc/debian_version 2>/dev/null) == 12*) ]]; then
        port_mapper_runs && mapper_ran=1
        apt_install rabbitmq-server
        # The service was not started; it must not start at the next boot
        # either, and setting it up leaves its port mapper behind.
        [[ ! -d /run/systemd/system ]] || as_root systemctl disable --now rabbitmq-server >/dev/null 2>&1 || true
        ((mapper_ran)) || ! port_mapper_runs || as_root epmd -kill >/dev/null 2>&1 || true
    fi
    [[ $(rabbitmq_root 3.10) == / ]] || install_tree 3.10 "$RABBITMQ_RELEASE_3_10"
}

port_mapper_runs() { (exec 3<>/dev/tcp/127.0.0.1/4369) 2>/dev/null; }

install_rabbitmq_4() { install_tree 4 "$RABBITMQ_RELEASE_4"; }

java_is_new_enough() {
    local major
    command -v java >/dev/null || return 1
    major=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
    [[ -n $major ]] && ((major >= 17))
}

install_kafka_4() {
    local home=$infra/kafka-$KAFKA_VERSION try=$infra/.kafka-$KAFKA_VERSION.new
    java_is_new_enough || apt_install openjdk-17-jre-headless
    [[ -e $home/.complete ]] && return 0
    command -v mvn >/dev/null || apt_install openjdk-17-jre-headless maven
    note "fetching Kafka $KAFKA_VERSION from Maven Central"
    rm -rf "$try"
    mkdir -p "$try"
    cat >"$try/pom.xml" <<XML
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>test</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>$LOG4J_VERSION</version></dependency>
  </dependencies>
</project>
XML
    (cd "$try" && mvn -B -ntp dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$try/libs") \
        >"$infra/maven.log" 2>&1 ||
        fail "maven could not fetch Kafka; see $infra/maven.log: $(grep -m 1 ERROR "$infra/maven.log" || tail -n 1 "$infra/maven.log")"
    touch "$try/.complete"
    rm -rf "$home"
    mv "$try" "$home"
}

install_registry_3() {
    local home=$infra/registry-$REGISTRY_VERSION try=$infra/.registry-$REGISTRY_VERSION.new
    local name=apicurio-registry-app-$REGISTRY_VERSION-all.tar.gz from
    from=https://repo.maven.apache.org/maven2/io/apicurio/apicurio-registry-app/$REGISTRY_VERSION
    java_is_new_enough || apt_install openjdk-17-jre-headless
    [[ -e $home/.complete ]] && return 0
    command -v curl >/dev/null || apt_install curl ca-certificates
    note "fetching Apicurio Registry $REGISTRY_VERSION from Maven Central"
    rm -rf "$try"
    mkdir -p "$try"
    # Not by Maven, which wants the descriptors of the program's parents too.
    curl -fsSL --retry 3 -o "$try/$name" "$from/$name" &&
        curl -fsSL --retry 3 -o "$try/sha1" "$from/$name.sha1" ||
        fail "the registry could not be fetched from $from/$name"
    (cd "$try" && echo "$(cut -c1-40 sha1)  $name" | sha1sum --check --quiet) ||
        fail "$name is not what its checksum says"
    tar -xzf "$try/$name" -C "$try"
    rm "$try/$name" "$try/sha1"
    touch "$try/.complete"
    rm -rf "$home"
    mv "$try" "$home"
}

install_kind() {
    mkdir -p "$infra"
    (
        # One installer at a time; what waits finds the work done.
        flock 9
        apt_install perl-base util-linux openssl
        case $1 in
            rabbitmq-3.10) install_rabbitmq_310 ;;
            rabbitmq-4) install_rabbitmq_4 ;;
            kafka-4) install_kafka_4 ;;
            registry-3) install_registry_3 ;;
            *) fail "unknown kind: $1 (one of: $KINDS)" ;;
        esac
    ) 9>"$infra/.lock"
}

is_installed() {
    case $1 in
        rabbitmq-3.10) [[ $(rabbitmq_root 3.10) == / || -e $infra/rabbitmq-3.10/.complete ]] ;;
        rabbitmq-4) [[ -e $infra/rabbitmq-4/.complete ]] ;;
        kafka-4) [[ -e $infra/kafka-$KAFKA_VERSION/.complete ]] && java_is_new_enough ;;
        registry-3) [[ -e $infra/registry-$REGISTRY_VERSION/.complete ]] && java_is_new_enough ;;
        *) return 1 ;;
    esac
}
