// CPU quotas of control groups, from the texts of machines that were never here.
#include "cgroup.h"

#include <map>

#include "check.h"

namespace fastrec::tests {
namespace {

using Files = std::map<std::string, std::string>;

int cpus(const Files& files) {
  return cgroup_cpus([&](const std::string& path) -> std::optional<std::string> {
    const auto found = files.find(path);
    if (found == files.end()) return std::nullopt;
    return found->second;
  });
}

const std::string kV2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
const std::string kV1 =
    "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n";

Files v2(const std::string& group, const std::string& mountinfo = kV2) {
  return {{"/proc/self/cgroup", "0::" + group + "\n"}, {"/proc/self/mountinfo", mountinfo}};
}

}  // namespace

TEST(cgroup_v2_quotas) {
  Files files = v2("/");
  CHECK(cpus(files) == 0);
  files["/sys/fs/cgroup/cpu.max"] = "max 100000\n";
  CHECK(cpus(files) == 0);
  files["/sys/fs/cgroup/cpu.max"] = "400000 100000\n";
  CHECK(cpus(files) == 4);
  files["/sys/fs/cgroup/cpu.max"] = "299999 100000\n";
  CHECK(cpus(files) == 2);
  files["/sys/fs/cgroup/cpu.max"] = "50000 100000\n";
  CHECK(cpus(files) == 1);
}

TEST(cgroup_v2_takes_the_tightest_ancestor) {
  Files files = v2("/pods/web");
  files["/sys/fs/cgroup/pods/web/cpu.max"] = "800000 100000\n";
  CHECK(cpus(files) == 8);
  files["/sys/fs/cgroup/pods/cpu.max"] = "300000 100000\n";
  CHECK(cpus(files) == 3);
  files["/sys/fs/cgroup/pods/web/cpu.max"] = "100000 50000\n";
  CHECK(cpus(files) == 2);
}

TEST(cgroup_roots_that_are_not_the_top) {
  // A container that is shown its own group as the mounted root, and the host's path as its group.
  const std::string mount = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
  Files files = v2("/docker/abc/inner", mount);
  files["/sys/fs/cgroup/inner/cpu.max"] = "200000 100000\n";
  CHECK(cpus(files) == 2);
  files = v2("/docker/abcd", mount);  // outside, although the text begins alike
  files["/sys/fs/cgroup/cpu.max"] = "600000 100000\n";
  CHECK(cpus(files) == 6);
  files = v2("/../other");  // outside the namespace
  files["/sys/fs/cgroup/cpu.max"] = "500000 100000\n";
  CHECK(cpus(files) == 5);
}

TEST(cgroup_v1_quotas) {
  Files files = {{"/proc/self/cgroup", "5:cpuset:/x\n4:cpu,cpuacct:/job\n0::/\n"},
                 {"/proc/self/mountinfo", kV1}};
  const std::string folder = "/sys/fs/cgroup/cpu,cpuacct";
  files[folder + "/job/cpu.cfs_quota_us"] = "-1\n";
  files[folder + "/job/cpu.cfs_period_us"] = "100000\n";
  CHECK(cpus(files) == 0);
  files[folder + "/job/cpu.cfs_quota_us"] = "350000\n";
  CHECK(cpus(files) == 3);
  files[folder + "/cpu.cfs_quota_us"] = "20000\n";
  CHECK(cpus(files) == 3);  // no period beside it
  files[folder + "/cpu.cfs_period_us"] = "10000\n";
  CHECK(cpus(files) == 2);
}

TEST(cgroup_texts_that_make_no_sense) {
  CHECK(cpus({}) == 0);
  CHECK(cpus(v2("/", "")) == 0);
  CHECK(cpus(v2("/", "1 2 - cgroup2\n - \n\n")) == 0);
  CHECK(cpus({{"/proc/self/cgroup", "::\n:\nnonsense"}, {"/proc/self/mountinfo", kV2}}) == 0);
  for (const char* text :
       {"", "\n", "max", "max max", "0 100000", "-5 100000", "100000 0", "a b"}) {
    Files files = v2("/");
    files["/sys/fs/cgroup/cpu.max"] = text;
    CHECK(cpus(files) == 0);
  }
  cgroup_cpus(read_file);  // this machine's own
}

}  // namespace fastrec::tests
