; tsc: the time stamp counter never goes back
;@ entry real16
%include "real16.inc"
start:
    rdtsc
    mov ebp, edx
    call be_moved
    rdtsc
    cmp edx, ebp
    jb failed
    jmp passed
