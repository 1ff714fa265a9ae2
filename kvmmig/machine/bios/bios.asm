; bios: what a boot sector expects of a PC, with the serial port for screen and keyboard
;
; The host copies this to f000:0, and the first 0x500 bytes of it, the interrupt vectors and the BIOS data area, to
; 0:0 as well; it fills in the table at `host_data`; and the first vCPU begins at f000:0500. An interrupt that
; nobody here serves, or a service's function that it has not got, ends the guest with a sentence.

    bits 16
    org 0

SERIAL      equ 0x3f8
PORT        equ 0x1b0           ; the host's: a byte written there makes it read `request` or `last_words`
HOST_READ   equ 1
HOST_WRITE  equ 2
HOST_REPORT equ 3
SEGMENT_    equ 0xf000
RESET       equ 0x64

; The BIOS data area, with segment 0
EQUIPMENT   equ 0x410
MEMORY      equ 0x413           ; KiB
CURSOR      equ 0x450           ; column, row
TICKS       equ 0x46c
MIDNIGHTS   equ 0x470
DISK_STATUS equ 0x441

; What a service finds at [bp] after SERVICE: the caller's registers
C_ES    equ 0
C_DS    equ 2
C_DI    equ 4
C_SI    equ 8
C_BX    equ 20
C_DX    equ 24
C_CX    equ 28
C_AX    equ 32
C_FLAGS equ 40

; Save the caller's registers; DS is 0 then, and ES this segment.
%macro SERVICE 0
    pushad
    push ds
    push es
    mov bp, sp
    push 0
    pop ds
    push cs
    pop es
    cld
%endmacro

; UNSERVED vector: the caller asked for a function that is not here.
%macro UNSERVED 1
    pop es
    pop ds
    popad
    push word %1
    jmp unserved
%endmacro

; --- the interrupt vectors: `stub` + 4 * n, but for those served here
%assign N 0
%rep 256
%if N = 0x08
    dw irq0, SEGMENT_
%elif N = 0x09 || N = 0x0c
    dw irq_master, SEGMENT_
%elif N >= 0x70 && N <= 0x77
    dw irq_slave, SEGMENT_
%elif N = 0x10
    dw int10, SEGMENT_
%elif N = 0x11
    dw int11, SEGMENT_
%elif N = 0x12
    dw int12, SEGMENT_
%elif N = 0x13
    dw int13, SEGMENT_
%elif N = 0x14
    dw int14, SEGMENT_
%elif N = 0x15
    dw int15, SEGMENT_
%elif N = 0x16
    dw int16, SEGMENT_
%elif N = 0x19
    dw int19, SEGMENT_
%elif N = 0x1a
    dw int1a, SEGMENT_
%elif N = 0x1b || N = 0x1c || N = 0x4a
    dw nothing, SEGMENT_
%elif N = 0x1e
    dw floppy_table, SEGMENT_
%else
    dw stubs + 4 * N, SEGMENT_
%endif
%assign N N + 1
%endrep

; --- the BIOS data area, from 0x400 on
    dw SERIAL, 0, 0, 0, 0, 0, 0, 0          ; COM and LPT ports
    dw 0x0021                               ; equipment: a floppy drive, 80 x 25 in colour
    db 0
    dw 636                                  ; KiB of memory below what the machine keeps for itself
    times 0x449 - ($ - $$) db 0
    db 3                                    ; the video mode
    dw 80                                   ; its columns
    times 0x463 - ($ - $$) db 0
    dw 0x3d4
    times 0x475 - ($ - $$) db 0
    db 1                                    ; fixed disks
    times 0x484 - ($ - $$) db 0
    db 24                                   ; rows, less one
    times 0x500 - ($ - $$) db 0

; --- the first instruction
start:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    mov al, 0x11                            ; both interrupt controllers, as a PC's BIOS leaves them
    out 0x20, al
    out 0xa0, al
    mov al, 0x08
    out 0x21, al
    mov al, 0x70
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xea                            ; timer, cascade, COM1
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    mov al, 0x36                            ; the timer: 18.2 times a second
    out 0x43, al
    xor al, al
    out 0x40, al
    out 0x40, al
    movzx edx, byte [cs:drive]
    xor eax, eax
    sti
    jmp 0:0x7c00

; --- interrupts from devices
irq0:
    push ds
    push 0
    pop ds
    inc dword [TICKS]
    cmp dword [TICKS], 0x1800b0
    jb .same_day
    mov dword [TICKS], 0
    inc byte [MIDNIGHTS]
.same_day:
    pop ds
    int 0x1c
irq_master:
    push ax
    mov al, 0x20
    out 0x20, al
    pop ax
nothing:
    iret
irq_slave:
    push ax
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop ax
    iret

; --- ends of services, with the caller's carry flag clear or set
good:
    and byte [bp + C_FLAGS], 0xfe
leave_service:
    pop es
    pop ds
    popad
    iret
bad:
    or byte [bp + C_FLAGS], 1
    jmp leave_service

; --- what nobody serves: a stub of four bytes a vector, which tells it by its place
stubs:
%rep 256
    call near from_stub
    nop
%endrep

from_stub:
    pop word [cs:last_words.vector]         ; behind the call of stub n
    sub word [cs:last_words.vector], stubs + 3
    shr word [cs:last_words.vector], 2
    push word [cs:last_words.vector]
unserved:                                   ; stack: vector, IP, CS, flags
    cli
    mov [cs:last_words.ax], ax
    mov [cs:last_words.bx], bx
    mov [cs:last_words.cx], cx
    mov [cs:last_words.dx], dx
    pop word [cs:last_words.vector]
    pop word [cs:last_words.ip]
    pop word [cs:last_words.cs]
    mov al, HOST_REPORT
    mov dx, PORT
    out dx, al
.for_ever:
    hlt
    jmp .for_ever

%include "int10.asm"
%include "int13.asm"
%include "int14.asm"
%include "int15.asm"
%include "int16.asm"
%include "int1a.asm"

; --- 11h, 12h and 19h: equipment, memory, boot again
int11:
    push ds
    push 0
    pop ds
    mov ax, [EQUIPMENT]
    pop ds
    iret
int12:
    push ds
    push 0
    pop ds
    mov ax, [MEMORY]
    pop ds
    iret
int19:
    mov al, 0xfe
    out RESET, al
.for_ever:
    jmp .for_ever

floppy_table:                               ; as a 1.44 MB drive's
    db 0xdf, 0x02, 0x25, 2, 18, 0x1b, 0xff, 0x6c, 0xf6, 0x0f, 0x08

; --- what host and BIOS tell each other, at a place that the host knows
    times 0x2000 - ($ - $$) db 0
host_data:
disk_sectors:   dd 0
disk_tracks:    dw 0
disk_heads:     dw 0
track_sectors:  dw 0
drive:          db 0
interrupts:     db 0                        ; 1 where there is an interrupt controller
tsc_khz:        dd 0
free_memory:    dd 0                        ; the end of RAM below 4 GiB that is the guest's
high_memory:    dd 0                        ; KiB of RAM from 4 GiB up
    times 0x40 - ($ - host_data) db 0       ; the disk's place among them, which only the host looks at
request:                                    ; of a disk
.sector:        dd 0
.address:       dd 0
.count:         dw 0
.status:        db 0                        ; the host's answer, as int 13h has it in AH
    times 0x60 - ($ - host_data) db 0
last_words:
.vector:        dw 0
.ax:            dw 0
.bx:            dw 0
.cx:            dw 0
.dx:            dw 0
.ip:            dw 0
.cs:            dw 0
